for (const button of document.querySelectorAll("button[data-copy]")) {
  const source = document.getElementById(button.dataset.copy), status = button.nextElementSibling;
  const plain = element => element.textContent.replace(/\s+/g, " ").trim();
  button.hidden = false;
  button.onclick = async () => {
    const parts = [...source.children].map(part => part.tagName !== "OL" ? plain(part)
      : "References\n" + [...part.children].map((item, n) => `[${n + 1}] ${plain(item)}`).join("\n"));
    const text = parts.join("\n\n") + "\n";
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // no clipboard without a secure context: copy a selection
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      const copied = document.execCommand("copy");
      area.remove();
      status.textContent = copied ? "Copied." : "The browser refused: select the text and copy it.";
      return;
    }
    status.textContent = "Copied.";
  };
}
