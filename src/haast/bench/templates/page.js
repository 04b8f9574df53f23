"use strict";
// The script of reports and traces, which the chat page loads too: light and dark, a trace's steps, a tree's nodes.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Light and dark: the system's choice, until the reader makes another, which is kept where the browser keeps things.
  // #dark and #light in the address make it too.
  const themes = ["dark", "light"];
  const kept = (...told) => {
    try {
      return told.length ? localStorage.setItem("haast-theme", told[0]) : localStorage.getItem("haast-theme");
    } catch {
      return null; // storage is forbidden to some pages, such as those of a sandbox
    }
  };
  const wished = location.hash.slice(1).split(",").find((word) => themes.includes(word)) || kept();
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (themes.includes(wished)) root.dataset.theme = wished;
  const toggle = document.createElement("button");
  const named = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`); };
  toggle.id = "theme";
  toggle.type = "button";
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; kept(root.dataset.theme); named(); });
  named();
  document.body.classList.add("with-theme");
  (document.querySelector("[data-theme-place]") || document.body).prepend(toggle);

  for (const trace of document.querySelectorAll(".trace")) {
    const steps = [...trace.querySelectorAll(".step")];
    if (!steps.length) continue;
    const links = [...trace.querySelectorAll(".answer a")];
    const slider = trace.querySelector(".stepper input");
    const [back, forth] = trace.querySelectorAll(".stepper button");
    const show = (at) => {
      at = Math.max(0, Math.min(steps.length - 1, at));
      steps.forEach((step, i) => step.classList.toggle("now", i === at));
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.find((one) => one.getAttribute("href") === `#${steps[at].id}`);
      if (link) link.setAttribute("aria-current", "step");
      slider.value = at + 1;
      slider.setAttribute("aria-valuetext", `step ${at + 1} of ${steps.length}`);
      back.disabled = at === 0;
      forth.disabled = at === steps.length - 1;
    };
    slider.addEventListener("input", () => show(slider.value - 1));
    back.addEventListener("click", () => show(slider.value - 2));
    forth.addEventListener("click", () => show(+slider.value));
    for (const link of links) {
      const at = steps.findIndex((step) => link.getAttribute("href") === `#${step.id}`);
      link.addEventListener("click", (event) => { event.preventDefault(); show(at); });
    }
    show(Math.max(0, steps.findIndex((step) => step.dataset.first !== undefined)));
  }

  // A node says why. Steps that come later do so too, so the whole document listens.
  const pick = (event) => {
    const node = event.target instanceof Element && event.target.closest(".step .node");
    if (!node || node.classList.contains("picked")) return;
    const step = node.closest(".step");
    step.querySelectorAll(".picked").forEach((one) => one.classList.remove("picked"));
    node.classList.add("picked");
    step.querySelector(".why").textContent = node.title;
  };
  for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, pick);

  // Arrows walk through a tree as it is drawn: to the parent, the first child, the sibling before and after.
  const ways = {
    ArrowLeft: (item) => item.parentElement.closest(".tree li"),
    ArrowRight: (item) => item.querySelector("li"),
    ArrowUp: (item) => item.previousElementSibling,
    ArrowDown: (item) => item.nextElementSibling,
  };
  document.addEventListener("keydown", (event) => {
    if (!(event.target instanceof Element) || !event.target.matches(".tree .node") || !ways[event.key]) return;
    event.preventDefault();
    ways[event.key](event.target.parentElement)?.querySelector(".node").focus();
  });
})();
