// Before the first paint: the theme of the last visit, else the system's. A classic script, so that nothing flashes.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("powerd-theme"); } catch { return null; } };
  const apply = () => { document.documentElement.dataset.theme = stored() ?? (system.matches ? "dark" : "light"); };
  system.addEventListener("change", () => { apply(); dispatchEvent(new Event("theme")); });
  apply();
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(document.documentElement.dataset.theme === "dark"));
    button.addEventListener("click", () => {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("powerd-theme", next); } catch { /* kept for this visit only */ }
      document.documentElement.dataset.theme = next;
      dispatchEvent(new Event("theme"));
    });
    addEventListener("theme", show);
    show();
  });
})();
