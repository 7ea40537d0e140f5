"""The lock on --exp-dir: a second training is refused, a killed one leaves none."""

import multiprocessing
import os
import socket

import pytest

from speechllm.errors import InputError
from speechllm.training.exp_dir_lock import exclusive


def hold(exp_dir, locked, end, child):
    with exclusive(exp_dir):
        if child:
            os.fork()  # such as a dataloader worker
        locked.set()
        end.poll(60)


@pytest.mark.parametrize("child", [False, True])
def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path, child):
    fork = multiprocessing.get_context("fork")
    locked, (end, received) = fork.Event(), fork.Pipe()
    first = fork.Process(target=hold, args=(tmp_path / "exp", locked, received, child))
    first.start()
    assert locked.wait(30)
    with pytest.raises(InputError) as error, exclusive(tmp_path / "exp"):
        pass
    assert str(error.value).startswith(
        f"--exp-dir {tmp_path}/exp is in use by another run (process {first.pid} on "
        f"{socket.gethostname()}): "
    )
    first.kill()
    first.join()
    with exclusive(tmp_path / "exp"):
        pass
    end.send("exit")  # to the child, which would keep pytest's output open
