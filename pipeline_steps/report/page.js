"use strict";

// Tables: a click on a header sorts by its column, numbers first from the largest, cells without a value always last.
function compare(x, y, direction) {
  if (x === null || y === null) return (x === null) - (y === null);
  return direction * (typeof x === "number" ? x - y : x.localeCompare(y));
}
function valueOf(cell) {
  const value = cell.dataset.value;
  if (value === undefined) return cell.textContent;
  return value === "" ? null : Number(value);
}
function sort(table, head, column) {
  const body = table.tBodies[0], rows = [...body.rows];
  const numeric = head.classList.contains("number");
  const order = { ascending: "descending", descending: "ascending" }[head.ariaSort] || (numeric ? "descending" : "ascending");
  table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const sums = rows.filter((row) => row.classList.contains("summary"));
  const others = rows.filter((row) => !row.classList.contains("summary"));
  const direction = order === "ascending" ? 1 : -1;
  others.sort((a, b) => compare(valueOf(a.cells[column]), valueOf(b.cells[column]), direction));
  body.append(...others, ...sums);
}
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(table, head, column));
  });
}

// Clips: one frame at a time, cut out of the picture that holds all of them (which is what shows without JavaScript).
function player(clip) {
  const { side, step, kinds } = JSON.parse(clip.dataset.geometry);
  const frames = clip.querySelector(".frames"), canvas = clip.querySelector("canvas");
  const slider = clip.querySelector("input"), label = clip.querySelector("output"), button = clip.querySelector("button");
  const line = 28, gap = step - side;
  const draw = () => {
    const t = Number(slider.value), context = canvas.getContext("2d");
    canvas.width = 2 * step - gap; // which also clears it
    canvas.height = Math.ceil(kinds.length / 2) * (side + line + gap) - gap;
    context.font = "17px system-ui, sans-serif";
    context.fillStyle = getComputedStyle(label).color;
    kinds.forEach((kind, number) => {
      const x = (number % 2) * step, y = Math.floor(number / 2) * (side + line + gap);
      context.fillText(number ? kind : `frame ${t}`, x, y + line - 9);
      context.drawImage(frames, number * step, t * step, side, side, x, y + line, side, side);
    });
    label.textContent = `frame ${t} (0–${slider.max})`;
  };
  let timer = null;
  const play = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => { slider.value = (Number(slider.value) + 1) % (Number(slider.max) + 1); draw(); }, 700) : null;
    button.textContent = on ? "\u275A\u275A" : "\u25B6";
    button.setAttribute("aria-label", on ? "Pause" : "Play");
    button.setAttribute("aria-pressed", String(on));
  };
  slider.addEventListener("input", () => { play(false); draw(); });
  button.addEventListener("click", () => play(timer === null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  frames.decode().then(() => {
    draw();
    clip.querySelectorAll(".scripted").forEach((element) => { element.hidden = false; });
    clip.querySelector(".still").hidden = true;
  });
}
document.querySelectorAll(".clip").forEach(player);
document.querySelectorAll("p.scripted, p > .scripted").forEach((element) => { element.hidden = false; });
