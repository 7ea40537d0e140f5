"""The picture of the system."""

from xml.etree import ElementTree

import draw_system


def test_the_same_picture_each_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw_system.main([str(tmp_path / name)])
    first, second = ((tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    shapes = ElementTree.fromstring(first).iter("{http://www.w3.org/2000/svg}path")
    assert len(list(shapes)) > len(draw_system.BOXES) + 2 * len(draw_system.ARROWS)
