// Draw: poses to start from, the settings, sampling with a bar, and Live.
import { $, ask, attempt, call, download, make, say } from "./app.js";
import { Editor, mirrored, paint } from "./skeleton.js";

const PAUSE = 120;              // ms without a change, before Live draws and the density is asked
const LIVE_STEPS = 4;

export async function startDraw(about, modes, show) {
  const form = $("settings").elements;
  let drawing = null, live = null, timer = 0;
  const editor = new Editor($("canvas"), about, () => changed());
  editor.moved = () => changed();

  // ------------------------------------------------------------------------- where poses come from

  const use = (pose) => {
    editor.change(pose.map((joint) => [...joint]));
    show("draw");
  };

  function offer(poses, first = false) {
    const buttons = poses.map(([name, pose]) => {
      const canvas = make("canvas", { width: 184, height: 184 });
      paint(canvas.getContext("2d"), pose, about, ([x, y]) => [184 * x, 184 * y], 5);
      return make("button", { onclick: () => use(pose), title: name }, canvas, name);
    });
    $("poses")[first ? "prepend" : "append"](...buttons);
  }

  // The pose of the image that Label shows, undistorted on the square.
  const fromImage = () => {
    const { pose, width, height } = modes().label.pose(), side = Math.max(width, height);
    use(pose.map(([x, y, v]) => (v ? [0.5 + (x - 0.5) * width / side,
                                      0.5 + (y - 0.5) * height / side, v] : [0, 0, 0])));
  };

  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    attempt(async () => {
      const { poses, text } = await ask("read", new Blob([event.dataTransfer.files[0]]));
      offer(poses, true);
      use(poses[0][1]);
      say(text);
    });
  });

  // ------------------------------------------------------------------------------------ sampling

  const settings = (extra) => ({
    pose: editor.pose, label: form.label.value, n: +form.n.value, seed: +form.seed.value,
    guidance: +form.guidance.value, steps: +form.steps.value, ...extra });

  // Draws; `onstep` gets the share of the steps made. Returns [[data URL, command], ...].
  async function sample(body, signal, onstep) {
    const response = await call(`draw/${form.ckpt.value}`, body, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return null;                            // a newer request has ended this one
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map(JSON.parse)) {
        if (line.error) throw new Error(line.error);
        if (line.pictures) return line.pictures;
        onstep(line.step / line.of);
      }
    }
  }

  const draw = () => attempt(async () => {
    if (drawing) return drawing.abort();
    drawing = new AbortController();
    live?.abort();
    $("sample").firstChild.data = "Stop ";
    $("drawing").hidden = false;
    say("");
    try {
      const found = await sample(settings(), drawing.signal, (share) => {
        $("drawing").value = share;
      });
      if (found) showPictures(found);
    } finally {
      drawing = null;
      $("drawing").hidden = true;
      $("sample").firstChild.data = "Draw ";
    }
  });

  // One image for the pose as it is now; the request before it is cancelled.
  const drawLive = () => attempt(async () => {
    if (drawing) return;
    live?.abort();
    live = new AbortController();
    const steps = Math.min(LIVE_STEPS, +form.steps.value);
    const found = await sample(settings({ n: 1, steps }), live.signal, () => {});
    if (found && !drawing) showPictures(found);
  });

  function showPictures(found) {
    $("pictures").replaceChildren(...found.map(([url, command], i) => make("figure",
      { style: "background: none" }, make("img", { src: url, alt: `Image ${i + 1}` }),
      make("div", {}, make("a", { href: url, textContent: "Save", title: "with its command",
                                  download: `seed-${command.match(/--seed (\d+)/)[1]}.png` }),
        make("button", { textContent: "Command", title: `Copy: ${command}`,
                         onclick: () => attempt(() => copy(command)) })))));
  }

  async function copy(command) {
    await navigator.clipboard.writeText(command);
    say("Copied. Save the pose as pose.json where you run it");
  }

  // -------------------------------------------------------------------------------------- changes

  function changed() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if ($("live").checked) drawLive();
      attempt(async () => {
        const { unusual } = await ask(`unusual/${form.ckpt.value}`, { pose: editor.pose });
        $("unusual").textContent = unusual === null ? ""
          : `rarer than ${Math.floor(100 * unusual)} % of the training poses`;
      });
    }, PAUSE);
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey) return false;
    const letter = event.key.toLowerCase();
    if (event.key === "Enter") draw();
    else if (letter === "x") editor.change(mirrored(editor.pose, about.mirror));
    else if (letter === "l") $("live").click();
    else return false;
    return true;
  }
  $("sample").onclick = draw;
  $("mirror").onclick = () => key({ key: "x" });
  $("live").onchange = changed;
  $("settings").onchange = (event) => (event.target.name === "ckpt" ? attempt(load) : changed());
  $("settings").onsubmit = (event) => event.preventDefault();
  $("save-pose").onclick = () => {
    const pose = Object.fromEntries(about.joints.map((name, j) => [name, editor.pose[j]]));
    download(`data:application/json,${encodeURIComponent(JSON.stringify(pose))}`, "pose.json");
  };

  // Another checkpoint has its own labels, defaults and training poses.
  async function load() {
    const k = form.ckpt.value || 0, told = await ask(`checkpoint/${k}`);
    form.ckpt.replaceChildren(...told.files.map((textContent, value) => make("option",
      { value, textContent, selected: value === +k })));
    form.label.replaceChildren(...["", ...told.labels].map((value) => make("option",
      { value, textContent: value || "any" })));
    form.label.parentElement.hidden = !told.labels.length;
    form.guidance.value = told.guidance;
    form.guidance.disabled = !told.guided;
    form.steps.value = told.steps;
    $("poses").replaceChildren();
    if (about.label) $("poses").append(make("button", { textContent: "the image in Label",
                                                        onclick: fromImage }));
    const { poses } = await ask(`poses/${k}`);
    offer(poses);
    return { files: told.files, poses };
  }
  const { files, poses } = await load();
  editor.open(poses.find(([name]) => name === "waving")?.[1] ?? poses[0][1], null, 1000, 1000);
  changed();
  return { editor, key, where: files.join(", ") };
}
