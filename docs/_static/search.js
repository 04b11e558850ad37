// The page search.html: asks Pagefind's index, which lies beside it.
const input = document.getElementById("search-input");
const state = document.getElementById("search-state");
const list = document.getElementById("search-results");
const MOST = 20;

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Excerpts are text with <mark> around what was found, and nothing else.
function excerpt(html) {
  const made = element("p", {});
  made.innerHTML = html;
  return made;
}

function entry(page) {
  const here = (url) => url.replace(/^\//, "");
  const item = element("li", {}, element("a", { href: here(page.url), textContent: page.meta.title }));
  const parts = page.sub_results.filter((part) => part.url !== page.url).slice(0, 3);
  item.append(excerpt((parts[0] ?? page).excerpt));
  if (parts.length) {
    const links = parts.map((part) =>
      element("li", {}, element("a", { href: here(part.url), textContent: part.title })));
    item.append(element("ul", {}, ...links));
  }
  return item;
}

let pagefind;
try {
  pagefind = await import(new URL("../pagefind/pagefind.js", import.meta.url));
} catch {
  state.textContent = "The search needs a web server: python3 -m http.server --directory build/docs";
}

let asked = 0;
async function search(words) {
  const mine = ++asked;
  if (!words.trim()) {
    state.textContent = "";
    list.replaceChildren();
    return;
  }
  const found = await pagefind.search(words);
  const pages = await Promise.all(found.results.slice(0, MOST).map((result) => result.data()));
  if (mine !== asked) return; // somebody typed on
  list.replaceChildren(...pages.map(entry));
  state.textContent = `${found.results.length} pages for “${words}”`;
}

if (pagefind) {
  input.value = new URLSearchParams(location.search).get("q") ?? "";
  input.addEventListener("input", () => search(input.value));
  document.getElementById("search-form").addEventListener("submit", (event) => event.preventDefault());
  input.focus();
  search(input.value);
}
