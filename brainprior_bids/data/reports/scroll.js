// A picture that is wider than its box can be scrolled with the keyboard.
const fit = box => {
  if (box.scrollWidth > box.clientWidth) {
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `Picture: ${box.parentElement.querySelector("h3")?.textContent ?? ""}`);
  } else for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
};
// the box changes its size with the window, and when its picture arrives
const observer = new ResizeObserver(entries => entries.forEach(entry => fit(entry.target)));
for (const box of document.querySelectorAll(".reportlet")) observer.observe(box);
