// One small chart on a canvas: bars or lines over a span of seconds, with a scale that a person can read.

const LEFT = 78, BOTTOM = 18, TOP = 6, BAND = 7;

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((f) => f * power).find((v) => v >= value);
}

export class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
  }

  describe(text) {
    if (this.canvas.getAttribute("aria-label") !== text) this.canvas.setAttribute("aria-label", text);
  }

  colour(name) {
    return name.startsWith("--") ? getComputedStyle(document.documentElement).getPropertyValue(name).trim() : name;
  }

  begin(span, most, unit) {
    const { canvas, context } = this, scale = window.devicePixelRatio || 1;
    this.width = canvas.clientWidth;
    this.height = canvas.clientHeight;
    canvas.width = Math.round(this.width * scale);
    canvas.height = Math.round(this.height * scale);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    this.top = nice(Math.max(most, 1e-9));
    this.x = (second) => LEFT + ((second - span.from) / (span.to - span.from)) * (this.width - LEFT - 4);
    this.y = (value) => this.height - BOTTOM - BAND - (value / this.top) * (this.height - TOP - BOTTOM - BAND);
    context.font = "12px system-ui, DejaVu Sans, sans-serif";
    context.fillStyle = this.colour("--soft");
    context.strokeStyle = this.colour("--line");
    context.lineWidth = 1;
    for (const share of [0, 0.5, 1]) {
      const y = Math.round(this.y(this.top * share)) + 0.5;
      context.beginPath();
      context.moveTo(LEFT, y);
      context.lineTo(this.width, y);
      context.stroke();
      context.textAlign = "right";
      context.textBaseline = share === 1 ? "top" : "middle";
      context.fillText(unit(this.top * share), LEFT - 5, share === 1 ? 0 : y);
    }
    context.textBaseline = "bottom";
    for (let minutes = 0; minutes * 60 <= span.to - span.from; minutes += 1) {
      const x = this.x(span.to - minutes * 60);
      context.textAlign = minutes === 0 ? "right" : "center";
      if (x > LEFT - 2) context.fillText(minutes === 0 ? "now" : `−${minutes} min`, x, this.height);
    }
  }

  bars(span, rows, colours) {
    const most = Math.max(1, ...rows.map((r) => r[1].reduce((a, b) => a + b, 0)));
    this.begin(span, most, (n) => (n % 1 ? n.toFixed(1) : `${n}`));
    const width = Math.max(1, this.x(span.from + 1) - this.x(span.from));
    for (const [second, counts] of rows) {
      let below = 0;
      counts.forEach((count, i) => {
        if (!count) return;
        this.context.fillStyle = colours[i];
        this.context.fillRect(this.x(second) - width, this.y(below + count), Math.ceil(width), this.y(below) - this.y(below + count));
        below += count;
      });
    }
  }

  lines(span, series, { unit, limit }) {
    const values = series.flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null);
    this.begin(span, Math.max(...values, limit ?? 0, 0), unit);
    const { context } = this;
    for (const { points, width, colour } of series) {
      context.strokeStyle = this.colour(colour);
      context.lineWidth = width;
      context.beginPath();
      let before = null;
      for (const [second, value] of points) {
        if (value === null) continue;
        // What is missing for longer than a few seconds is a gap, not a line.
        if (before === null || second - before > 5) { context.moveTo(this.x(second) - 1, this.y(value)); context.lineTo(this.x(second), this.y(value)); }
        else context.lineTo(this.x(second), this.y(value));
        before = second;
      }
      context.stroke();
    }
    if (limit) {
      context.strokeStyle = this.colour("--bad");
      context.lineWidth = 1.5;
      context.setLineDash([6, 4]);
      context.beginPath();
      context.moveTo(LEFT, this.y(limit));
      context.lineTo(this.width, this.y(limit));
      context.stroke();
      context.setLineDash([]);
    }
  }

  band(span, rows) {
    const width = Math.max(1, this.x(span.from + 1) - this.x(span.from));
    for (const [second, colour] of rows) {
      this.context.fillStyle = colour;
      this.context.fillRect(this.x(second) - width, this.height - BOTTOM - BAND + 2, Math.ceil(width), BAND - 2);
    }
  }
}
