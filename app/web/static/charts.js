// Draws the series that a page brings as JSON. The same numbers stand in the table under each chart.
"use strict";

(() => {
  const HEIGHT = 220;
  const language = document.documentElement.lang;
  const short = new Intl.NumberFormat(language, { notation: "compact", maximumFractionDigits: 1 });
  const exact = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
  const percent = new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: 1 });
  // The periods are local times of the report's zone, told as if they were UTC: the reader's zone must not move them.
  const inUtc = (options) => new Intl.DateTimeFormat(language, { timeZone: "UTC", ...options });
  const day = inUtc({ day: "numeric", month: "short" });
  const hour = inUtc({ hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  const wholeDay = inUtc({ dateStyle: "medium" });
  const wholeHour = inUtc({ dateStyle: "medium", timeStyle: "short", hourCycle: "h23" });

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function shown(value, unit, format) {
    if (value == null) return "–";
    if (unit === "ratio") return percent.format(value);
    if (unit === "milliseconds") return value < 1000 ? `${exact.format(value)} ms` : `${exact.format(value / 1000)} s`;
    return format.format(value);
  }

  function dates(told, ticks) {
    const midnight = (at) => at % 86400 === 0;
    return ticks.map((at) => (told.hours && !midnight(at) ? hour : day).format(at * 1000));
  }

  // All charts have one time axis, that of the range: a report has no row for a period without anything.
  const figures = Array.from(document.querySelectorAll("figure.chart"));
  const tellings = new Map(figures.map((figure) => [figure, JSON.parse(figure.querySelector("script").textContent)]));
  const times = Array.from(tellings.values(), (told) => told.times).flat();
  const first = Math.min(...times);
  const last = Math.max(...times, first + 86400);

  function draw(figure) {
    const told = tellings.get(figure);
    const canvas = figure.querySelector(".canvas");
    const axis = {
      stroke: style("--ink-2"),
      font: `12px ${style("--sans")}`,
      grid: { stroke: style("--line"), width: 1 },
      ticks: { show: false },
    };
    const plot = new uPlot(
      {
        width: canvas.clientWidth,
        height: HEIGHT,
        tzDate: (at) => uPlot.tzDate(new Date(at * 1000), "Etc/UTC"),
        cursor: { sync: { key: "page" }, y: false },
        scales: { x: { range: () => [first, last] }, y: { range: (_, low, high) => [0, (high || 1) * 1.05] } },
        axes: [
          { ...axis, space: 80, incrs: told.hours ? undefined : [1, 2, 7, 14, 28, 91, 182, 365].map((days) => days * 86400), values: (_, ticks) => dates(told, ticks) },
          { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => shown(tick, told.unit, short)) },
        ],
        series: [
          { label: figure.dataset.time, value: (_, at) => (at == null ? "–" : (told.hours ? wholeHour : wholeDay).format(at * 1000)) },
          ...told.labels.map((label, index) => ({
            label,
            stroke: style(`--series-${index + 1}`),
            fill: told.area && index === 0 ? style("--series-1-area") : undefined,
            width: 2,
            points: { show: told.times.length < 3 ? true : undefined, size: 6 },
            value: (_, value) => shown(value, told.unit, exact),
          })),
        ],
      },
      [told.times, ...told.lines],
      canvas,
    );
    const resized = new ResizeObserver(() => plot.setSize({ width: canvas.clientWidth, height: HEIGHT }));
    resized.observe(canvas);
    return () => {
      resized.disconnect();
      plot.destroy();
    };
  }

  let remove = [];
  function drawAll() {
    remove.forEach((one) => one());
    remove = figures.map(draw);
  }
  drawAll();
  // Colours are read when it is drawn.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
