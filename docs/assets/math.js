// Typeset what pymdownx.arithmatex marked, \( ... \) in a line and \[ ... \] as a display, and $ ... $ of notebooks.
document.addEventListener("DOMContentLoaded", () => {
  const typeset = (element, text, displayMode) => katex.render(text, element, { displayMode, throwOnError: false });
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    typeset(element, text.slice(2, -2), text.startsWith("\\["));
  }
  for (const cell of document.querySelectorAll(".jp-RenderedMarkdown")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    const nodes = [];
    while (walker.nextNode()) {
      if (walker.currentNode.data.includes("$") && !walker.currentNode.parentElement.closest("code, pre")) {
        nodes.push(walker.currentNode);
      }
    }
    for (const node of nodes) {
      const parts = node.data.split(/(\$\$[^$]+\$\$|\$[^$\n]+\$)/).map((part) => {
        const marks = part.length > 2 && part.startsWith("$") ? part.match(/^\$+/)[0].length : 0;
        if (!marks) return part;
        const element = document.createElement("span");
        if (marks === 2) element.className = "formula";
        typeset(element, part.slice(marks, -marks), marks === 2);
        return element;
      });
      node.replaceWith(...parts);
    }
  }
});
