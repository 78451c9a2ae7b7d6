"use strict";

// Tables: a heading sorts, a field above filters.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const number = button.dataset.kind === "number";
      const key = (row) => number ? Number(row.cells[column].dataset.value) : row.cells[column].textContent;
      const compare = number ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, {numeric: true});
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort((a, b) => (up ? 1 : -1) * compare(a[0], b[0]));
      table.tBodies[0].append(...rows.map((pair) => pair[1]));
    });
  });
}
for (const field of document.querySelectorAll("input[data-table]")) {
  const rows = [...document.getElementById(field.dataset.table).tBodies[0].rows];
  const texts = rows.map((row) =>
    [...row.querySelectorAll(".text")].map((cell) => cell.textContent).join(" ").toLowerCase());
  const count = document.querySelector(`output[data-count="${field.dataset.table}"]`);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, place) => {
      row.hidden = !words.every((word) => texts[place].includes(word));
      shown += !row.hidden;
    });
    count.textContent = `${shown} of ${rows.length}`;
  });
}

// Confusion matrix: all classes as a picture, and a part of it as a table with names.
const WINDOW = 14; // classes of the table; so many or fewer need no picture
const detail = document.getElementById("detail");
if (detail) {
  const {names, order, cells} = JSON.parse(document.getElementById("matrix-data").textContent);
  const place = new Array(order.length);
  order.forEach((label, position) => { place[label] = position; });
  const totals = new Array(names.length).fill(0);
  const counts = new Map();
  cells[0].forEach((label, k) => {
    counts.set(label * names.length + cells[1][k], cells[2][k]);
    totals[label] += cells[2][k];
  });
  const count = (row, column) => counts.get(order[row] * names.length + order[column]) || 0;
  const share = (row, column) => count(row, column) / Math.max(1, totals[order[row]]);
  const colour = (row, column) => {
    const style = getComputedStyle(document.documentElement);
    return style.getPropertyValue(row === column ? "--blue" : "--red").trim();
  };
  const strength = (row, column) => count(row, column) ? 0.3 + 0.7 * Math.sqrt(share(row, column)) : 0;
  const say = (row, column) => {
    const n = count(row, column), all = totals[order[row]];
    const part = all ? ` (${(100 * n / all).toFixed(1)} %)` : "";
    return `True class ${names[order[row]]}, predicted ${names[order[column]]}: ${n} of ${all} videos${part}`;
  };
  const readout = document.getElementById("readout");

  const windowOf = (position) =>
    Math.max(0, Math.min(order.length - WINDOW, position - Math.floor(WINDOW / 2)));
  const showPart = (row, column, chosen) => {
    const ranges = [windowOf(row), windowOf(column)].map((start) =>
      Array.from({length: Math.min(WINDOW, order.length)}, (_, k) => start + k));
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    head.append(document.createElement("th"));
    for (const k of ranges[1]) {
      const cell = document.createElement("th"), text = document.createElement("span");
      text.textContent = names[order[k]];
      cell.title = text.textContent;
      cell.scope = "col";
      cell.append(text);
      head.append(cell);
    }
    const body = table.createTBody();
    for (const r of ranges[0]) {
      const line = body.insertRow(), name = document.createElement("th");
      name.textContent = name.title = names[order[r]];
      name.scope = "row";
      line.append(name);
      for (const c of ranges[1]) {
        const cell = line.insertCell();
        if (count(r, c)) {
          cell.textContent = count(r, c);
          cell.style.background =
            `color-mix(in srgb, ${colour(r, c)} ${(65 * strength(r, c)).toFixed(0)}%, var(--panel))`;
        }
        cell.title = say(r, c);
        if (chosen && r === row && c === column) cell.className = "chosen";
      }
    }
    detail.replaceChildren(table);
  };

  // The first part shown is around the most frequent error.
  let worst = [0, 0], most = 0;
  cells[0].forEach((label, k) => {
    if (label !== cells[1][k] && cells[2][k] > most) {
      most = cells[2][k];
      worst = [place[label], place[cells[1][k]]];
    }
  });
  showPart(...worst, false);

  const overview = document.getElementById("overview"), canvas = overview.querySelector("canvas");
  let at = worst;
  if (order.length > WINDOW) {
    overview.hidden = false;
    const size = Math.max(2, Math.min(16, Math.floor(800 / order.length)));
    canvas.width = canvas.height = size * order.length;
    const draw = () => {
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, canvas.width, canvas.height);
      cells[0].forEach((label, k) => {
        const row = place[label], column = place[cells[1][k]];
        context.globalAlpha = strength(row, column);
        context.fillStyle = colour(row, column);
        context.fillRect(column * size, row * size, size, size);
      });
      context.globalAlpha = 1;
    };
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    const cellAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const read = (value, start, length) =>
        Math.max(0, Math.min(order.length - 1, Math.floor((value - start) / length * order.length)));
      return [read(event.clientY, box.top, box.height), read(event.clientX, box.left, box.width)];
    };
    const go = (cell) => {
      at = cell;
      readout.textContent = say(...at);
      showPart(...at, true);
    };
    canvas.addEventListener("mousemove", (event) => { readout.textContent = say(...cellAt(event)); });
    canvas.addEventListener("click", (event) => go(cellAt(event)));
    canvas.addEventListener("keydown", (event) => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (step) {
        event.preventDefault();
        go(at.map((value, axis) => Math.max(0, Math.min(order.length - 1, value + step[axis]))));
      }
    });
  }
  for (const button of document.querySelectorAll("button.show")) {
    button.addEventListener("click", () => {
      at = [place[button.dataset.true], place[button.dataset.predicted]];
      readout.textContent = say(...at);
      showPart(...at, true);
      detail.scrollIntoView({block: "center"});
    });
  }
}
