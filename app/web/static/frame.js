// What every page needs of a script. All of it is also readable without: times stand there in UTC, numbers of the load.
"use strict";

(() => {
  const two = (number) => String(number).padStart(2, "0");

  // <time datetime data-local="moment|time">: in the reader's own zone; the title has it in UTC.
  function showLocal(root) {
    for (const time of root.querySelectorAll("time[data-local]")) {
      const at = new Date(time.dateTime);
      const clock = [at.getHours(), at.getMinutes(), at.getSeconds()].map(two).join(":");
      time.title = `${time.dateTime.slice(0, 10)} ${time.dateTime.slice(11, 19)} UTC`;
      const day = [at.getFullYear(), two(at.getMonth() + 1), two(at.getDate())].join("-");
      time.textContent = time.dataset.local === "time" ? clock : `${day} ${clock}`;
    }
  }

  // [data-poll="seconds"] with hx-trigger="tick": asks again while somebody can see it, and soon after he has come back.
  const asked = new WeakMap();
  function tick() {
    if (document.visibilityState !== "visible") return;
    for (const part of document.querySelectorAll("[data-poll]")) {
      if (part.classList.contains("htmx-request")) continue;
      const now = performance.now();
      if (!asked.has(part)) asked.set(part, now);
      if (now - asked.get(part) >= 1000 * Number(part.dataset.poll)) {
        asked.set(part, now);
        part.dispatchEvent(new Event("tick"));
      }
    }
  }

  // <span data-countdown="seconds">: as minutes and seconds, down to nothing.
  function countDown() {
    const left = (part) => Math.max(0, Number(part.dataset.countdown) - Math.floor(performance.now() / 1000));
    for (const part of document.querySelectorAll("[data-countdown]")) {
      const seconds = left(part);
      part.textContent = `${Math.floor(seconds / 60)}:${two(seconds % 60)}`;
    }
  }

  // [data-lost] is shown while what is polled does not answer.
  function lost(isLost) {
    for (const note of document.querySelectorAll("[data-lost]")) note.hidden = !isLost;
  }

  setInterval(tick, 250);
  setInterval(countDown, 1000);
  // For the whole page first, then for each part that replaces another.
  document.addEventListener("htmx:load", (event) => showLocal(event.detail.elt));
  document.addEventListener("htmx:afterRequest", (event) => {
    // Not detail.elt: what has replaced itself is gone by now, and its place holder stands there.
    const asked = event.detail.requestConfig.elt;
    if (asked.hasAttribute("data-poll")) lost(!event.detail.successful);
    // What a link can't get in place is gone to: the page there says what is the matter.
    else if (asked.href && !event.detail.successful) location.assign(asked.href);
  });

  // [data-grows]: what replaces it is longer, and what one reads stands below it: that stays where it is.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const part = event.detail.target;
    if (!event.detail.shouldSwap || !part.hasAttribute("data-grows")) return;
    const below = part.nextElementSibling;
    const top = () => below.getBoundingClientRect().top;
    const before = top();
    const stay = () => scrollBy({ top: top() - before, behavior: "instant" });
    document.addEventListener("htmx:afterSwap", stay, { once: true });
  });

  // A click that opens a tab or a window of its own is the browser's, not htmx's.
  document.addEventListener("click", (event) => {
    if ((event.ctrlKey || event.metaKey || event.shiftKey) && event.target.closest("a[hx-get]")) event.stopPropagation();
  }, true);

  // <button data-copy="id" hidden>: shown where it can work; says for a moment that it has.
  for (const button of document.querySelectorAll("button[data-copy]")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent.trim());
      const said = button.firstChild;
      const before = said.data;
      said.data = button.dataset.done;
      setTimeout(() => { said.data = before; }, 1500);
    });
  }
})();
