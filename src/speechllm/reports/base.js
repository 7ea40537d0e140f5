// Sorting, filtering and searching of the utterances, and playing them.
const list = document.querySelector(".utterances");
const articles = [...list.children];
const search = document.querySelector("input[type=search]");
const sort = document.querySelector("select");
const boxes = [...document.querySelectorAll(".bar input[type=checkbox]")];
const audio = document.querySelector("audio");
const texts = new Map();

// `[n → m]`, `[n → *]` or `[* → m]` of each error: the search terms of the tables.
function errors(article) {
  const found = [];
  for (const mark of article.querySelectorAll(".text del, .text ins")) {
    const between = mark.nextSibling;
    const next = between?.nodeValue?.trim() === "" ? between.nextSibling : between;
    const isPair = mark.tagName === "DEL" && next?.tagName === "INS";
    if (isPair) found.push(`[${mark.textContent} → ${next.textContent}]`);
    else if (mark.tagName === "DEL") found.push(`[${mark.textContent} → *]`);
    else if (!found.paired) found.push(`[* → ${mark.textContent}]`);
    found.paired = isPair;
  }
  return found;
}

function text(article) {
  if (!texts.has(article)) {
    const all = [article.textContent, ...errors(article)].join(" ");
    texts.set(article, all.toLowerCase().replace(/\s+/g, " "));
  }
  return texts.get(article);
}

function filter() {
  const wanted = search.value.toLowerCase().trim().replace(/\s+/g, " ");
  const classes = boxes.filter((box) => box.checked).map((box) => box.value);
  let count = 0;
  for (const article of articles) {
    const fits =
      classes.every((name) => article.classList.contains(name)) &&
      (!wanted || text(article).includes(wanted));
    article.hidden = !fits;
    count += fits;
  }
  document.querySelector("output").value = `${count} of ${articles.length}`;
}

function order() {
  const key = sort.value;
  // The sort is stable; articles without a value come last.
  const value = (article) => Number(article.dataset[key] ?? -Infinity);
  const byId = (a, b) => (a.dataset.id < b.dataset.id ? -1 : 1);
  list.append(...[...articles].sort(key === "id" ? byId : (a, b) => value(b) - value(a) || 0));
}

let playing; // link of the audio in the player

function play(link) {
  if (link === playing && !audio.paused) return audio.pause();
  playing = link;
  audio.src = link.href;
  audio.hidden = false;
  audio.play().catch(() => {}); // the error listener below reports failures
}

audio.addEventListener("error", () => (playing.textContent = "cannot be played here"));

document.addEventListener("click", (event) => {
  const find = event.target.closest(".find");
  if (find) {
    search.value = find.dataset.find;
    filter();
    document.querySelector(".bar").scrollIntoView();
  }
  const link = event.target.closest("a.play");
  if (link) {
    event.preventDefault();
    play(link);
  }
});
search.addEventListener("input", filter);
boxes.forEach((box) => box.addEventListener("change", filter));
sort.addEventListener("change", order);
order(); // the browser may have kept the previous choice
filter();
