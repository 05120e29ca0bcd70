// A skeleton on a canvas: 17 joints [x, y, visible] in 0..1 of an image, dragged, placed and undone.
const REACH = 14;               // CSS pixels around a joint within which it is taken
const MARGIN = 24;              // around the image
const ZOOM_MOST = 40;
const HIDDEN = 0.5;
const GROUND = "#181a22";
// The head first, then each limb outward: the next joint is near the last one.
const ORDER = [0, 1, 2, 3, 4, 5, 7, 9, 6, 8, 10, 11, 13, 15, 12, 14, 16];

const emptyPose = () => Array.from({ length: 17 }, () => [0, 0, 0]);
export const isEmpty = (pose) => pose.every((joint) => !joint[2]);
const rounded = (value) => Math.round(value * 1e6) / 1e6;

// The pose [17, 3] of the mirrored image; with `stay` only the names of left and right change.
export function mirrored(pose, mirror, stay = false) {
  return mirror.map((j) => { const [x, y, v] = pose[j]; return [stay || !v ? x : 1 - x, y, v]; });
}

// Draws limbs and joints; `at` gives the place of a joint on the canvas.
export function paint(context, pose, about, at, size) {
  const color = (a, b) => `rgb(${about.colors[a].map((c, i) => (c + about.colors[b][i]) / 2)})`;
  context.lineCap = "round";
  for (const [a, b] of about.limbs) {
    if (!pose[a][2] || !pose[b][2]) continue;
    const path = new Path2D();
    path.moveTo(...at(pose[a]));
    path.lineTo(...at(pose[b]));
    for (const [style, width] of [["#0008", size + 2], [color(a, b), size]]) {
      Object.assign(context, { strokeStyle: style, lineWidth: width });
      context.stroke(path);
    }
  }
  pose.forEach((joint, j) => {
    if (!joint[2]) return;
    context.beginPath();
    context.arc(...at(joint), size * 1.6, 0, 7);
    Object.assign(context, { fillStyle: joint[2] === HIDDEN ? GROUND : color(j, j),
                             strokeStyle: joint[2] === HIDDEN ? color(j, j) : "#000a",
                             lineWidth: joint[2] === HIDDEN ? size * 0.7 : 1 });
    context.fill();
    context.stroke();
  });
}

export class Editor {
  // `changed()` is called after each finished change, also after undo; `hint` shows the next step.
  constructor(canvas, about, changed, hint = {}) {
    Object.assign(this, { canvas, about, changed, hint, pose: emptyPose(), image: null,
                          width: 1, height: 1, selected: -1, hover: -1, placing: -1,
                          history: { past: [], future: [] } });
    canvas.onpointerdown = (event) => this.down(event);
    canvas.onpointermove = (event) => this.move(event);
    canvas.onpointerup = () => this.up();
    canvas.onwheel = (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    };
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // Shows a pose [17, 3] on an image, or on an empty square; `history` is what undo goes through.
  open(pose, image, width, height, history = { past: [], future: [] }) {
    Object.assign(this, { pose, image, width, height, history, selected: -1, hover: -1 });
    this.place(-1);
    this.whole();
  }

  resize() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    if (!w || !h) return;
    Object.assign(this.canvas, { width: w * devicePixelRatio, height: h * devicePixelRatio });
    this.whole();
  }

  whole() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    const scale = Math.min((w - 2 * MARGIN) / this.width, (h - 2 * MARGIN) / this.height);
    this.fit = Math.max(scale, 1e-6);
    this.view = { scale: this.fit, x: (w - scale * this.width) / 2,
                  y: (h - scale * this.height) / 2 };
    this.draw();
  }

  zoomBy(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const { view } = this;
    const scale = Math.min(Math.max(view.scale * factor, this.fit / 2), this.fit * ZOOM_MOST);
    view.x = x - (x - view.x) * scale / view.scale;
    view.y = y - (y - view.y) * scale / view.scale;
    view.scale = scale;
    this.draw();
  }

  at = ([x, y]) => [this.view.x + x * this.width * this.view.scale,
                    this.view.y + y * this.height * this.view.scale];

  // The place on the image of a pointer, kept within one image around it.
  under(event) {
    const { view } = this;
    return [(event.offsetX - view.x) / view.scale / this.width,
            (event.offsetY - view.y) / view.scale / this.height].map(
      (value) => rounded(Math.min(Math.max(value, -1), 2)));
  }

  nearest(event) {
    const far = this.pose.map((joint) => {
      const [x, y] = this.at(joint);
      return joint[2] ? Math.hypot(x - event.offsetX, y - event.offsetY) : Infinity;
    });
    const least = Math.min(...far);
    return least <= REACH ? far.indexOf(least) : -1;
  }

  // ------------------------------------------------------------------------------ undo without end

  copy = () => this.pose.map((joint) => [...joint]);

  change(pose) {
    if (JSON.stringify(pose) === JSON.stringify(this.pose)) return;
    this.history.past.push(this.pose);
    this.history.future = [];
    this.pose = pose;
    this.draw();
    this.changed();
  }

  undo(from = "past", to = "future") {
    if (!this.history[from].length) return;
    this.history[to].push(this.pose);
    this.pose = this.history[from].pop();
    if (this.placing >= 0) this.placeNext(-1);
    this.draw();
    this.changed();
  }

  set(j, joint) {
    const pose = this.copy();
    pose[j] = joint;
    this.change(pose);
  }

  // ---------------------------------------------------------------------------------- the pointer

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    const j = event.button ? -1 : this.nearest(event);
    if (this.placing >= 0 && !event.button) {
      const placed = this.placing;
      this.set(placed, [...this.under(event), 1]);
      this.selected = placed;
      this.placeNext(placed);
    } else if (j >= 0) {
      this.selected = j;
      this.drag = { j, before: this.copy() };
    } else {
      this.pan = { x: event.offsetX - this.view.x, y: event.offsetY - this.view.y };
    }
    this.draw();
  }

  move(event) {
    if (this.drag) {
      this.pose = this.drag.before.map((joint) => [...joint]);
      const [x, y] = this.under(event);
      if (event.shiftKey) this.swing(this.drag.j, x, y);
      else this.pose[this.drag.j] = [x, y, this.pose[this.drag.j][2]];
      this.moved?.();
    } else if (this.pan) {
      this.view.x = event.offsetX - this.pan.x;
      this.view.y = event.offsetY - this.pan.y;
    } else {
      this.hover = this.nearest(event);
    }
    this.draw();
  }

  up() {
    if (this.drag) {
      const pose = this.pose;
      this.pose = this.drag.before;
      this.drag = null;
      this.change(pose);
    }
    this.pan = null;
  }

  // Turns joint j, and all that hangs on it, about its parent toward a place, so that every limb
  // keeps its length on the image. Shoulders and hips take the whole body along.
  swing(j, x, y) {
    const pose = this.pose, { parents } = this.about;
    const size = [this.width, this.height], px = (p) => [p[0] * size[0], p[1] * size[1]];
    const middle = (a, b) => [(pose[a][0] + pose[b][0]) / 2, (pose[a][1] + pose[b][1]) / 2];
    const hangs = (k) => k === j || (parents[k] < 17 && hangs(parents[k]));
    const parent = j === 0 ? (pose[5][2] && pose[6][2] ? middle(5, 6) : null)
      : parents[j] < 17 && pose[parents[j]][2] ? pose[parents[j]] : null;
    const [ox, oy] = px(pose[j]), [tx, ty] = px([x, y]);
    const [cx, cy] = parent ? px(parent) : [0, 0];
    const turn = Math.atan2(ty - cy, tx - cx) - Math.atan2(oy - cy, ox - cx);
    pose.forEach((joint, k) => {
      if (!joint[2] || (parent && !hangs(k))) return;
      const [kx, ky] = px(joint), [dx, dy] = [kx - cx, ky - cy];
      const [nx, ny] = parent ? [cx + dx * Math.cos(turn) - dy * Math.sin(turn),
                                 cy + dx * Math.sin(turn) + dy * Math.cos(turn)]
        : [kx + tx - ox, ky + ty - oy];
      joint[0] = rounded(nx / size[0]);
      joint[1] = rounded(ny / size[1]);
    });
  }

  // --------------------------------------------------------------------------------- place mode

  place(j) {
    this.placing = j;
    this.hint.textContent = j < 0 ? "" : `Click the ${this.title(j)}. `
      + "H: the last one is hidden. Delete: it is not in the image. Escape: stop";
    this.draw();
  }

  // Asks for the next missing joint after j; of all, for -1.
  placeNext(j) {
    this.place(ORDER.slice(ORDER.indexOf(j) + 1).find((k) => !this.pose[k][2]) ?? -1);
  }

  title = (j) => this.about.joints[j].split("_").reverse().join(" ");

  // ------------------------------------------------------------------------------------ the keys

  // Handles a key; false if it is not one of the editor's.
  key(event) {
    const { key, shiftKey } = event, j = this.selected, joint = this.pose[j];
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1],
                    ArrowDown: [0, 1] }[key];
    const letter = key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (letter === "z" && !shiftKey) this.undo();
      else if (letter === "y" || letter === "z") this.undo("future", "past");
      else return false;
    } else if (arrow && j >= 0) {
      const [x, y, v] = joint[2] ? joint : [0.5, 0.5, 1], by = shiftKey ? 10 : 1;
      this.set(j, [rounded(x + by * arrow[0] / this.width),
                   rounded(y + by * arrow[1] / this.height), v]);
    } else if (key === "Tab" && event.target === this.canvas) {
      const at = ORDER.indexOf(j) + (shiftKey ? -1 : 1);
      this.selected = ORDER[(at + 17) % 17];
    } else if (letter === "h" && j >= 0 && joint[2]) {
      this.set(j, [joint[0], joint[1], joint[2] === 1 ? HIDDEN : 1]);
    } else if (key === "Delete" || key === "Backspace") {
      if (this.placing >= 0) this.placeNext(this.placing);
      else if (j >= 0) this.set(j, [0, 0, 0]);
    } else if (letter === "p") {
      if (this.placing >= 0) this.place(-1);
      else this.placeNext(-1);
    } else if (key === "Escape") {
      if (this.placing < 0 && j < 0) this.canvas.blur();
      this.selected = -1;
      this.place(-1);
    } else if (key === "+" || key === "=" || key === "-") {
      this.zoomBy(key === "-" ? 1 / 1.3 : 1.3);
    } else if (key === "0") this.whole();
    else return false;
    this.draw();
    return true;
  }

  draw() {
    if (!this.view) return;
    const { canvas, view, about } = this, context = canvas.getContext("2d");
    const box = [view.x, view.y, this.width * view.scale, this.height * view.scale];
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    if (this.image?.naturalWidth) {
      context.imageSmoothingEnabled = view.scale * this.width / this.image.naturalWidth < 3;
      context.drawImage(this.image, ...box);
    }
    context.strokeStyle = "#fff3";
    context.strokeRect(...box);
    paint(context, this.pose, about, this.at, Math.min(Math.max(box[3] / 130, 2.5), 6));
    const shown = this.drag ? this.drag.j : this.hover >= 0 ? this.hover : this.selected;
    if (this.selected >= 0 && this.pose[this.selected][2]) {
      context.beginPath();
      context.arc(...this.at(this.pose[this.selected]), 12, 0, 7);
      Object.assign(context, { strokeStyle: "#fff", lineWidth: 2 });
      context.stroke();
    }
    if (shown < 0) return;
    const [, , visible] = this.pose[shown], [x, y] = visible ? this.at(this.pose[shown])
      : [canvas.clientWidth / 2, 24];
    const text = this.title(shown) + { 0: ", missing", 0.5: ", hidden", 1: "" }[visible];
    context.font = "13px system-ui, sans-serif";
    const width = context.measureText(text).width;
    context.fillStyle = "#000c";
    context.fillRect(x + 14, y - 24, width + 12, 21);
    context.fillStyle = "#fff";
    context.fillText(text, x + 20, y - 9);
  }
}
