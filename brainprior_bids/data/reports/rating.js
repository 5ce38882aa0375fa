const storage = (() => {
  try { return window.localStorage; } catch { return null; }  // the browser may refuse it
})();
for (const form of document.querySelectorAll("form.rating")) {
  const { scan, source, sha256, fingerprint, version } = form.dataset;
  const key = `brainprior rating ${scan} ${fingerprint}`, status = form.querySelector("[role=status]");
  const entries = () => {
    const data = new FormData(form);
    return {
      rating: data.get("rating"), artefacts: data.getAll("artefacts"),
      comment: data.get("comment").trim(), rater: data.get("rater").trim(),
    };
  };
  const remember = () => {
    const values = entries();
    status.textContent = "";
    try {
      storage.setItem(key, JSON.stringify(values));
      storage.setItem("brainprior rater", values.rater);
    } catch {
      status.textContent = "This browser does not remember the rating: save it.";
    }
  };
  const before = JSON.parse(storage?.getItem(key) ?? "{}");
  form.elements.rating.value = before.rating ?? "";
  for (const box of form.elements.artefacts) box.checked = before.artefacts?.includes(box.value);
  form.elements.comment.value = before.comment ?? "";
  form.elements.rater.value = before.rater ?? storage?.getItem("brainprior rater") ?? "";
  form.hidden = false;
  form.oninput = remember;
  form.onreset = () => {
    storage?.removeItem(key);
    status.textContent = "Cleared.";
  };
  form.onsubmit = event => {
    event.preventDefault();
    const record = {
      scan, source, source_sha256: sha256, fingerprint, version, ...entries(),
      rated_at: new Date().toISOString(),
    };
    const blob = new Blob([JSON.stringify(record, null, 2), "\n"], { type: "application/json" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${scan}_rating.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    status.textContent = `Saved as ${link.download}, where this browser puts downloads.`;
  };
}
