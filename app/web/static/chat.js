// Talks to the service's own API. What arrives is only ever text: it is put into nodes by textContent.
"use strict";

(() => {
  const chat = document.querySelector("[data-chat]");
  const words = JSON.parse(document.getElementById("chat-words").textContent);
  const transcript = document.getElementById("transcript");
  const blank = document.getElementById("message-blank");
  const form = chat.querySelector("form.composer");
  const box = form.elements.message;
  const button = form.querySelector("button");
  const user = chat.dataset.user;
  let session = chat.dataset.session;
  let waiting = false;

  box.disabled = button.disabled = false;
  if (matchMedia("(max-width: 52rem)").matches) chat.querySelector(".chat-past").open = false;
  else box.focus({ preventScroll: true });
  if (transcript.lastElementChild) form.scrollIntoView({ block: "end" });

  box.addEventListener("keydown", (event) => {
    // An input method's Enter chooses a word.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });

  for (const list of chat.querySelectorAll(".suggestions")) {
    list.hidden = false;
    list.addEventListener("click", ({ target }) => {
      if (!target.matches("button")) return;
      box.value = target.textContent;
      form.requestSubmit();
      box.focus({ preventScroll: true });
    });
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = box.value;
    if (waiting || !text.trim()) return;
    box.value = "";
    document.getElementById("chat-empty")?.remove();
    newMessage("user").querySelector(".message-text").textContent = text;
    send({ text, key: newKey(), answer: newMessage("assistant") });
  });

  // One turn, as often as it takes. The key makes a second attempt the same request, so nothing is said twice.
  async function send(turn) {
    waiting = button.disabled = true;
    turn.answer.classList.remove("message-failed");
    turn.answer.querySelector(".failure")?.remove();
    const stopWaiting = tellHowLong(turn.answer.querySelector(".message-wait"));
    turn.answer.scrollIntoView({ block: "nearest" });
    try {
      if (!session) {
        session = (await call(`/api/chat/sessions?user_id=${encodeURIComponent(user)}`, {})).session_id;
        keepInAddress();
      }
      const answer = await call(`/api/chat/sessions/${session}/messages?user_id=${encodeURIComponent(user)}`, {
        body: JSON.stringify({ message: turn.text }),
        headers: { "Content-Type": "application/json", "Idempotency-Key": turn.key },
      });
      stopWaiting();
      show(turn.answer, answer);
      htmx.ajax("GET", `/chat/past?${state()}`, { target: "#past", swap: "innerHTML" });
    } catch (problem) {
      stopWaiting();
      fail(turn, problem);
    }
    waiting = button.disabled = false;
    turn.answer.scrollIntoView({ block: "nearest" });
  }

  const state = () => new URLSearchParams({ user_id: user, session });

  function keepInAddress() {
    history.replaceState(null, "", `/?${state()}`);
  }

  // The API's answer, or its problem document as an exception.
  async function call(path, request) {
    let response, answer;
    try {
      response = await fetch(path, { method: "POST", ...request });
      answer = await response.json();
    } catch {
      throw { detail: response ? `${response.status} ${response.statusText}` : words.unreachable };
    }
    if (!response.ok) throw answer;
    return answer;
  }

  function newMessage(role) {
    const message = blank.content.firstElementChild.cloneNode(true);
    message.classList.add(`message-${role}`);
    message.querySelector(".message-role").textContent = words[role];
    transcript.append(message);
    return message;
  }

  function tellHowLong(note) {
    const began = performance.now();
    const tell = () => {
      const seconds = Math.floor((performance.now() - began) / 1000);
      note.textContent = seconds < 3 ? words.thinking : words.slow.replace("{seconds}", seconds);
    };
    tell();
    note.hidden = false;
    const telling = setInterval(tell, 500);
    return () => {
      clearInterval(telling);
      note.hidden = true;
    };
  }

  // As Language.duration of the service: a message says the same once the page is loaded again.
  function duration(milliseconds) {
    if (milliseconds > 0 && milliseconds < 1000) return `${milliseconds} ms`;
    const seconds = milliseconds / 1000;
    const digits = seconds > 0 && seconds < 10 ? 1 : 0;
    const number = new Intl.NumberFormat(document.documentElement.lang, { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return words.seconds.replace("{value}", number.format(seconds));
  }

  function show(message, answer) {
    message.querySelector(".message-text").textContent = answer.assistant_response;
    message.querySelector(".message-facts").textContent = words.took.replace("{time}", duration(answer.processing_time_ms));
    if (!answer.sources.length) return;
    const sources = message.querySelector(".sources");
    sources.hidden = false;
    sources.querySelector("summary").textContent = words.sources.replace("{count}", answer.sources.length);
    sources.querySelector("ul").replaceChildren(...answer.sources.map((source) => {
      const item = document.createElement("li");
      const name = document.createElement("bdi");
      name.textContent = typeof source === "string" ? source : JSON.stringify(source);
      item.append(name);
      return item;
    }));
  }

  function fail(turn, problem) {
    turn.answer.classList.add("message-failed");
    const failure = document.createElement("div");
    failure.className = "failure";
    const title = document.createElement("strong");
    title.textContent = words.failed;
    const why = document.createElement("p");
    why.lang = "en";
    why.textContent = [problem.detail, problem.hint].filter(Boolean).join(" – ");
    const again = document.createElement("button");
    again.type = "button";
    again.className = "button";
    again.textContent = words.resend;
    again.addEventListener("click", () => {
      if (waiting) return;
      send(turn);
      box.focus({ preventScroll: true });
    });
    failure.append(title, why, again);
    turn.answer.append(failure);
  }

  // crypto.randomUUID is there on https and on localhost alone.
  function newKey() {
    return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  }
})();
