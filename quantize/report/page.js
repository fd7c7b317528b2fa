// Tooltips, and cells of the pictures that lead to their numbers. All numbers are there without it.
(() => {
  const tip = document.getElementById("tip");
  const rowAt = (picture, event) => {
    const box = picture.getBoundingClientRect(), d = picture.dataset;
    const column = Math.floor((event.clientX - box.left - d.x) / d.w);
    const row = d.row ?? Math.floor((event.clientY - box.top - d.y) / d.h);
    return document.getElementById(`${d.key}${row}-${column}`);
  };
  for (const picture of document.querySelectorAll("svg[data-key]")) {
    picture.dataset.live = "";
    picture.addEventListener("mousemove", (event) => {
      const row = rowAt(picture, event);
      tip.hidden = !row;
      if (!row) return;
      const table = row.closest("table"), heads = table.tHead.rows[0].cells;
      const lines = Array.from(
        row.cells, (cell, i) => `${heads[i].textContent} ${cell.textContent}`);
      tip.textContent = [table.caption.textContent, ...lines].join("\n");
      const x = event.clientX + 16, y = event.clientY + 16;
      tip.style.left = `${Math.min(x, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(y, innerHeight - tip.offsetHeight - 8)}px`;
    });
    picture.addEventListener("mouseleave", () => { tip.hidden = true; });
    picture.addEventListener("click", (event) => {
      const row = rowAt(picture, event);
      if (!row || event.target.closest("a")) return;
      event.preventDefault();  // where the picture is in a summary
      row.closest("details").open = true;
      location.hash = row.id;
    });
  }
})();
