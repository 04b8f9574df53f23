"use strict";
// The script of reports, traces and the chat page: light and dark theme, the steps of a trace, the nodes of a tree.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // The theme: that of the system, until the reader chooses one, which local storage keeps. #dark or #light in the
  // address chooses it too.
  const themes = ["dark", "light"];
  const storedTheme = (...value) => {
    try {
      return value.length ? localStorage.setItem("haast-theme", value[0]) : localStorage.getItem("haast-theme");
    } catch {
      return null; // some pages, such as sandboxed ones, may not use local storage
    }
  };
  const chosen = location.hash.slice(1).split(",").find((word) => themes.includes(word)) || storedTheme();
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (themes.includes(chosen)) root.dataset.theme = chosen;
  const toggle = document.createElement("button");
  const label = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`); };
  toggle.id = "theme";
  toggle.type = "button";
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; storedTheme(root.dataset.theme); label(); });
  label();
  document.body.classList.add("with-theme");
  (document.querySelector("[data-theme-place]") || document.body).prepend(toggle);

  for (const trace of document.querySelectorAll(".trace")) {
    const steps = [...trace.querySelectorAll(".step")];
    if (!steps.length) continue;
    const links = [...trace.querySelectorAll(".answer a")];
    const slider = trace.querySelector(".stepper input");
    const [previous, next] = trace.querySelectorAll(".stepper button");
    const show = (wanted) => {
      const at = Math.max(0, Math.min(steps.length - 1, wanted));
      steps.forEach((step, i) => step.classList.toggle("now", i === at));
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.find((one) => one.getAttribute("href") === `#${steps[at].id}`);
      if (link) link.setAttribute("aria-current", "step");
      slider.value = at + 1;
      slider.setAttribute("aria-valuetext", `step ${at + 1} of ${steps.length}`);
      previous.disabled = at === 0;
      next.disabled = at === steps.length - 1;
    };
    slider.addEventListener("input", () => show(slider.value - 1));
    previous.addEventListener("click", () => show(slider.value - 2));
    next.addEventListener("click", () => show(+slider.value));
    for (const link of links) {
      const at = steps.findIndex((step) => link.getAttribute("href") === `#${step.id}`);
      link.addEventListener("click", (event) => { event.preventDefault(); show(at); });
    }
    show(Math.max(0, steps.findIndex((step) => step.dataset.first !== undefined)));
  }

  // Show why a node was accepted or not. The whole document listens, so that steps that are added later work too.
  const pick = (event) => {
    const node = event.target instanceof Element && event.target.closest(".step .node");
    if (!node || node.classList.contains("picked")) return;
    const step = node.closest(".step");
    step.querySelectorAll(".picked").forEach((one) => one.classList.remove("picked"));
    node.classList.add("picked");
    step.querySelector(".why").textContent = node.title;
  };
  for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, pick);

  // Arrow keys move through a tree as it is drawn: to the parent, the first child, the previous or next sibling.
  const moves = {
    ArrowLeft: (item) => item.parentElement.closest(".tree li"),
    ArrowRight: (item) => item.querySelector("li"),
    ArrowUp: (item) => item.previousElementSibling,
    ArrowDown: (item) => item.nextElementSibling,
  };
  document.addEventListener("keydown", (event) => {
    if (!(event.target instanceof Element) || !event.target.matches(".tree .node") || !moves[event.key]) return;
    event.preventDefault();
    moves[event.key](event.target.parentElement)?.querySelector(".node").focus();
  });
})();
