// What is under the pointer, or was tapped, is said beside the figure's heading too.
for (const kind of ["pointerover", "pointerdown"])
  document.addEventListener(kind, (event) => {
    const hovered = event.target.closest(".hover");
    if (!hovered) return;
    const readout = hovered.closest("figure").querySelector("output");
    readout.textContent = hovered.querySelector("title").textContent;
  });
