// Shows the rank map of report.html at another step. Without script the map stands at the end of the run.
const run = JSON.parse(document.getElementById("ranks").textContent);
const slider = document.getElementById("step");
const label = document.getElementById("at");
const cells = document.querySelectorAll("[data-of]");
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
let timer;

function show(frame) {
  const ranks = run.ranks[frame];
  for (const cell of cells) {
    const layers = cell.dataset.of ? cell.dataset.of.split(",") : [];
    const alive = sum(layers.map((layer) => ranks[layer]));
    if (cell.classList.contains("total")) {
      cell.textContent = alive;
      continue;
    }
    const start = run.start[layers[0]];
    const strength = start ? Math.min(1, (alive / start) ** 0.6) : 0; // as `shade` in report_log.py
    cell.textContent = alive || "";
    cell.title = `${cell.dataset.name}: ${alive} of ${start}`;
    cell.style.setProperty("--v", strength);
    cell.classList.toggle("zero", alive === 0);
    cell.classList.toggle("high", strength > 0.6);
  }
  const total = sum(ranks).toLocaleString("en");
  label.textContent = `step ${run.steps[frame].toLocaleString("en")} · ${total} components`;
}

slider.max = run.steps.length - 1;
slider.value = slider.max;
slider.oninput = () => {
  clearInterval(timer);
  show(+slider.value);
};
document.getElementById("play").onclick = () => {
  clearInterval(timer);
  let frame = 0;
  const next = () => {
    slider.value = frame;
    show(frame);
    if (++frame > +slider.max) clearInterval(timer);
  };
  next();
  timer = setInterval(next, 450);
};
document.querySelector(".slider").classList.add("on");
show(+slider.max);
