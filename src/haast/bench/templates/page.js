"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Light and dark: the system's choice, until the reader makes another. #dark and #light in the address do so too.
  const wished = location.hash.slice(1).split(",").find((word) => word === "dark" || word === "light");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (wished) root.dataset.theme = wished;
  const toggle = document.createElement("button");
  const named = () => { toggle.textContent = dark() ? "Light" : "Dark"; toggle.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`); };
  toggle.id = "theme";
  toggle.type = "button";
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; named(); });
  named();
  document.body.classList.add("with-theme");
  document.body.prepend(toggle);

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

    for (const step of steps) {
      const words = step.querySelector(".why");
      const pick = (event) => {
        const node = event.target.closest(".node");
        if (!node) return;
        step.querySelectorAll(".picked").forEach((one) => one.classList.remove("picked"));
        node.classList.add("picked");
        words.textContent = node.title;
      };
      for (const kind of ["mouseover", "focusin", "click"]) step.addEventListener(kind, pick);
    }
  }
})();
