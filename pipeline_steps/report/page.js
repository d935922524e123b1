"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const first = body.rows[0] && body.rows[0].cells[column];
    if (first && first.dataset.value !== undefined) head.classList.add("right");
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending === -1 ? "descending" : "ascending");
      const rows = [...body.rows].filter((row) => !row.classList.contains("summary"));
      const summary = [...body.rows].filter((row) => row.classList.contains("summary"));
      const key = (row) => { const cell = row.cells[column]; return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent; };
      rows.sort((a, b) => { const x = key(a), y = key(b); return descending * (typeof x === "number" ? x - y : x.localeCompare(y)); });
      body.append(...rows, ...summary);
    });
  });
}
for (const clip of document.querySelectorAll(".clip")) {
  const geometry = JSON.parse(clip.dataset.geometry);
  const animation = clip.querySelector(".animation"), canvas = clip.querySelector("canvas"), sheet = clip.querySelector(".sheet");
  const slider = clip.querySelector("input"), label = clip.querySelector("output");
  const kinds = geometry.rows.slice(0, -1); // without the overlay
  const draw = async () => {
    await sheet.decode();
    const t = Number(slider.value), side = geometry.side, gap = geometry.step - side, line = 26;
    canvas.width = 2 * side + gap;
    canvas.height = Math.ceil(kinds.length / 2) * (side + line + gap) - gap;
    const context = canvas.getContext("2d");
    context.font = "17px sans-serif";
    context.fillStyle = getComputedStyle(label).color;
    kinds.forEach((kind, row) => {
      const x = (row % 2) * geometry.step, y = Math.floor(row / 2) * (side + line + gap);
      context.fillText(row ? kind : `frame ${geometry.frames[t]}`, x, y + line - 8);
      context.drawImage(sheet, geometry.left + t * geometry.step, geometry.top + row * geometry.step, side, side, x, y + line, side, side);
    });
    canvas.hidden = false;
    animation.hidden = true;
    label.textContent = `frame ${geometry.frames[t]}`;
  };
  slider.addEventListener("input", draw);
  clip.querySelector("button").addEventListener("click", () => { canvas.hidden = true; animation.hidden = false; label.textContent = "plays"; });
}
