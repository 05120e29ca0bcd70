// A skeleton on a canvas: 17 joints [x, y, visible] in 0..1 of an image, dragged, placed and undone.
const REACH = 14;               // CSS pixels around a joint within which it is taken
const MARGIN = 24;              // around the image
const ZOOM_MOST = 40;
const HIDDEN = 0.5;
const GROUND = "#181a22";
// The head first, then each limb outward: the next joint is near the last one.
const ORDER = [0, 1, 2, 3, 4, 5, 7, 9, 6, 8, 10, 11, 13, 15, 12, 14, 16];
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export const copied = (pose) => pose.map((joint) => [...joint]);
export const isEmpty = (pose) => pose.every((joint) => !joint[2]);
export const newHistory = () => ({ past: [], future: [] });

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
    const hidden = joint[2] === HIDDEN;
    context.beginPath();
    context.arc(...at(joint), size * 1.6, 0, 7);
    Object.assign(context, { fillStyle: hidden ? GROUND : color(j, j), lineWidth: hidden ? 3 : 1,
                             strokeStyle: hidden ? color(j, j) : "#000a" });
    context.fill();
    context.stroke();
  });
}

export class Editor {
  // `changed()` is called after each finished change, also after undo; `hint` shows the next step.
  constructor(canvas, about, changed, hint = {}) {
    Object.assign(this, { canvas, about, changed, hint, image: null, history: newHistory(),
                          pose: about.joints.map(() => [0, 0, 0]), width: 1, height: 1,
                          selected: -1, hover: -1, placing: -1 });
    canvas.onpointerdown = (event) => this.down(event);
    canvas.onpointermove = (event) => this.move(event);
    canvas.onpointerup = () => this.up();
    canvas.onwheel = (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    };
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // Shows a pose [17, 3] on an image, or on an empty square; `history` is what undo goes through.
  open(pose, image, width, height, history = newHistory()) {
    Object.assign(this, { pose, image, width, height, history, selected: -1, hover: -1 });
    this.place(-1);
    this.resize();
  }

  // Fits the whole image into the canvas.
  resize() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    if (!w || !h) return;
    Object.assign(this.canvas, { width: w * devicePixelRatio, height: h * devicePixelRatio });
    const scale = Math.min((w - 2 * MARGIN) / this.width, (h - 2 * MARGIN) / this.height);
    this.fit = Math.max(scale, 1e-6);
    this.view = { scale: this.fit, x: (w - scale * this.width) / 2,
                  y: (h - scale * this.height) / 2 };
    this.draw();
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
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
  under({ offsetX, offsetY }) {
    const { x, y, scale } = this.view;
    return [(offsetX - x) / scale / this.width, (offsetY - y) / scale / this.height].map(
      (value) => Math.min(Math.max(value, -1), 2));
  }

  // The joint under a pointer, or -1.
  nearest({ offsetX, offsetY }) {
    const far = this.pose.map((joint) => {
      const [x, y] = this.at(joint);
      return joint[2] ? Math.hypot(x - offsetX, y - offsetY) : Infinity;
    });
    const least = Math.min(...far);
    return least <= REACH ? far.indexOf(least) : -1;
  }

  // ------------------------------------------------------------------------------ undo without end

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
    this.change(this.pose.with(j, joint));
  }

  // ---------------------------------------------------------------------------------- the pointer

  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    const { placing } = this, j = event.button ? -1 : this.nearest(event);
    if (placing >= 0 && !event.button) {
      this.set(placing, [...this.under(event), 1]);
      this.selected = placing;
      this.placeNext(placing);
    } else if (j >= 0) {
      this.selected = j;
      this.drag = { j, before: this.pose };
    } else {
      this.pan = { x: event.offsetX - this.view.x, y: event.offsetY - this.view.y };
    }
    this.draw();
  }

  move(event) {
    if (this.drag) {
      const { j, before } = this.drag;
      this.pose = copied(before);
      if (event.shiftKey) this.swing(j, this.under(event));
      else this.pose[j] = [...this.under(event), before[j][2]];
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
    const { pose, drag } = this;
    this.drag = this.pan = null;
    if (!drag) return;
    this.pose = drag.before;
    this.change(pose);
  }

  // Moves joint j toward a place, at its distance from its parent, and all that hangs on it along:
  // every limb keeps its length on the image. Shoulders and hips take the whole body along.
  swing(j, [x, y]) {
    const { pose, width, height } = this, { parents } = this.about, joint = pose[j];
    const hangs = (k) => k === j || (k in pose && hangs(parents[k]));
    const parent = pose[parents[j]]?.[2] ? pose[parents[j]] : null;
    const body = !parent && j > 0;
    if (parent) {
      const far = (a, b) => Math.hypot((a[0] - b[0]) * width, (a[1] - b[1]) * height);
      const ratio = far(joint, parent) / (far([x, y], parent) || 1);
      [x, y] = [parent[0] + (x - parent[0]) * ratio, parent[1] + (y - parent[1]) * ratio];
    }
    const [dx, dy] = [x - joint[0], y - joint[1]];
    pose.forEach(([px, py, v], k) => {
      if (v && (body || hangs(k))) pose[k] = [px + dx, py + dy, v];
    });
  }

  // --------------------------------------------------------------------------------- place mode

  place(j) {
    this.placing = j;
    this.hint.textContent = j < 0 ? "" : `Click the person's ${this.title(j)}. `
      + "Covered: click where it must be, then H. Not in the image: Delete. Escape: stop";
    this.draw();
  }

  // Asks for the next missing joint after j; of all, for -1. P with no joint missing starts anew.
  placeNext(j) {
    this.place(ORDER.slice(ORDER.indexOf(j) + 1).find((k) => !this.pose[k][2]) ?? -1);
    if (this.placing < 0) this.hint.textContent = "That was the last joint. Enter: done, next";
  }

  title = (j) => this.about.joints[j].split("_").reverse().join(" ");

  // ------------------------------------------------------------------------------------ the keys

  // Handles a key; false if it is not one of the editor's.
  key({ key, shiftKey, ctrlKey, metaKey, target }) {
    const j = this.selected, joint = this.pose[j], letter = key.toLowerCase();
    if (ctrlKey || metaKey) {
      if (letter === "z" && !shiftKey) this.undo();
      else if (letter === "y" || letter === "z") this.undo("future", "past");
      else return false;
    } else if (key in ARROWS && joint) {
      const [x, y, v] = joint[2] ? joint : [0.5, 0.5, 1], by = shiftKey ? 10 : 1;
      this.set(j, [x + by * ARROWS[key][0] / this.width, y + by * ARROWS[key][1] / this.height, v]);
    } else if (key === "Tab" && target === this.canvas) {
      this.selected = ORDER.at((ORDER.indexOf(j) + (shiftKey ? -1 : 1)) % 17);
    } else if (letter === "h" && joint?.[2]) {
      this.set(j, joint.with(2, joint[2] === 1 ? HIDDEN : 1));
    } else if (key === "Delete" || key === "Backspace") {
      if (this.placing >= 0) this.placeNext(this.placing);
      else if (joint) this.set(j, [0, 0, 0]);
    } else if (letter === "p") {
      if (this.placing >= 0) this.place(-1);
      else {
        if (this.pose.every((each) => each[2])) this.change(this.pose.map(() => [0, 0, 0]));
        this.placeNext(-1);
      }
    } else if (key === "Escape") {
      if (this.placing < 0 && !joint) this.canvas.blur();     // Tab then leaves the canvas
      this.selected = -1;
      this.place(-1);
    } else if ("+=-".includes(key)) this.zoom(key === "-" ? 1 / 1.3 : 1.3);
    else if (key === "0") this.resize();
    else return false;
    this.draw();
    return true;
  }

  draw() {
    if (!this.view) return;
    const { canvas, view, about, pose, image } = this, context = canvas.getContext("2d");
    const box = [view.x, view.y, this.width * view.scale, this.height * view.scale];
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    if (image?.naturalWidth) {
      context.imageSmoothingEnabled = box[2] / image.naturalWidth < 3;
      context.drawImage(image, ...box);
    }
    context.strokeStyle = "#fff3";
    context.strokeRect(...box);
    paint(context, pose, about, this.at, Math.min(Math.max(box[3] / 130, 2.5), 6));
    if (pose[this.selected]?.[2]) {
      context.beginPath();
      context.arc(...this.at(pose[this.selected]), 12, 0, 7);
      Object.assign(context, { strokeStyle: "#fff", lineWidth: 2 });
      context.stroke();
    }
    const shown = this.drag?.j ?? (this.hover >= 0 ? this.hover : this.selected);
    if (shown < 0) return;
    const visible = pose[shown][2];
    const [x, y] = visible ? this.at(pose[shown]) : [canvas.clientWidth / 2, 24];
    const text = this.title(shown) + { 0: ", missing", 0.5: ", hidden", 1: "" }[visible];
    context.font = "13px system-ui, sans-serif";
    context.fillStyle = "#000c";
    context.fillRect(x + 14, y - 24, context.measureText(text).width + 12, 21);
    context.fillStyle = "#fff";
    context.fillText(text, x + 20, y - 9);
  }
}
