// A small plot of the last minutes on a canvas, with one line per series.

export const SPAN_S = 120; // time range of a plot
const MAX_SAMPLES = 240;
const GAP_S = 4; // larger gaps between samples are not connected: hidden tab, or no connection
const LEFT = 40;
const BOTTOM = 16;
const TOP = 6;

export class Plot {
  #canvas;
  #colors;
  #format;
  #samples = []; // {time, values}, oldest first

  /**
   * @param canvas the canvas element
   * @param colors custom properties of the style sheet, one per series
   * @param format function from a value to its label on the axis
   */
  constructor(canvas, { colors, format = (value) => value.toLocaleString("en") }) {
    this.#canvas = canvas;
    this.#colors = colors;
    this.#format = format;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Add a sample and repaint: seconds of a monotonic clock, and one value per series. */
  add(time, values, description) {
    this.#samples.push({ time, values });
    if (this.#samples.length > MAX_SAMPLES) this.#samples.shift();
    this.#canvas.setAttribute("aria-label", description);
    this.draw();
  }

  /** Repaint the plot. */
  draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width || !height) return; // hidden
    const scale = devicePixelRatio;
    this.#canvas.width = Math.round(width * scale);
    this.#canvas.height = Math.round(height * scale);
    const pen = this.#canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.#canvas);
    const now = this.#samples.at(-1)?.time ?? 0;
    const shown = this.#samples.filter((sample) => sample.time >= now - SPAN_S - GAP_S);
    const top = niceTop(Math.max(0, ...shown.flatMap((sample) => sample.values)));
    const x = (time) => LEFT + (1 - (now - time) / SPAN_S) * (width - LEFT - 2);
    const y = (value) => TOP + (1 - value / top) * (height - TOP - BOTTOM);

    this.#drawAxes(pen, style, { width, height, top, y });
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, width - LEFT, height - BOTTOM + 2);
    pen.clip();
    for (let series = this.#colors.length - 1; series >= 0; series -= 1) {
      const color = style.getPropertyValue(this.#colors[series]);
      this.#drawLine(pen, color, shown, series, { x, y }); // reversed: the first series is on top
    }
    pen.restore();
  }

  #drawAxes(pen, style, { width, height, top, y }) {
    pen.font = `11px ${style.fontFamily}`;
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of [0, top / 2, top]) {
      const at = Math.round(y(value)) + 0.5;
      pen.beginPath();
      pen.moveTo(LEFT, at);
      pen.lineTo(width, at);
      pen.stroke();
      pen.fillText(this.#format(value), LEFT - 6, at);
    }
    pen.textBaseline = "bottom";
    pen.fillText("now", width, height);
    pen.textAlign = "left";
    pen.fillText(`${SPAN_S / 60} min ago`, LEFT, height);
  }

  #drawLine(pen, color, samples, series, { x, y }) {
    pen.strokeStyle = pen.fillStyle = color;
    pen.lineWidth = 1.75;
    pen.lineJoin = "round";
    let start = 0;
    samples.forEach((sample, i) => {
      const next = samples[i + 1];
      if (next !== undefined && next.time - sample.time <= GAP_S) return;
      const run = samples.slice(start, i + 1).map((one) => [x(one.time), y(one.values[series])]);
      start = i + 1;
      pen.beginPath();
      run.forEach(([px, py]) => pen.lineTo(px, py));
      pen.stroke();
      if (series > 0) return;
      pen.lineTo(run.at(-1)[0], y(0));
      pen.lineTo(run[0][0], y(0));
      pen.globalAlpha = 0.14;
      pen.fill();
      pen.globalAlpha = 1;
    });
  }
}

/** The smallest of 2, 4, 10, 20, 40, 100, ... that is at least `value`; its half is an integer. */
function niceTop(value) {
  let unit = 1;
  for (;;) {
    for (const step of [2, 4, 10]) if (value <= step * unit) return step * unit;
    unit *= 10;
  }
}
