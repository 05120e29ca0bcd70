// Draw: poses to start from, the settings, sampling with a bar, and Live.
import { $, ask, attempt, call, make, say } from "./app.js";
import { Editor, copied, mirrored, paint } from "./skeleton.js";

const PAUSE = 120;              // ms without a change, before Live draws and the density is asked
const LIVE_STEPS = 4;

export async function startDraw(about, modes, show) {
  const form = $("settings").elements, model = await ask("model");
  let drawing = null, live = null, timer = 0;
  const editor = new Editor($("canvas"), about, () => changed());
  editor.moved = () => changed();

  // ------------------------------------------------------------------------- where poses come from

  function use(pose) {
    editor.change(copied(pose));
    show("draw");
  }

  const offered = (poses) => poses.map(([name, pose]) => {
    const canvas = make("canvas", { width: 184, height: 184 });
    paint(canvas.getContext("2d"), pose, about, ([x, y]) => [184 * x, 184 * y], 5);
    return make("button", { onclick: () => use(pose), title: name }, canvas, name);
  });

  // The pose of the image that Label shows, undistorted on the square.
  function fromImage() {
    const { pose, width, height } = modes.label.pose(), side = Math.max(width, height);
    use(pose.map(([x, y, v]) => (v ? [0.5 + (x - 0.5) * width / side,
                                      0.5 + (y - 0.5) * height / side, v] : [0, 0, 0])));
  }

  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) attempt(async () => {
      const { poses, text } = await ask("read", new Blob([event.dataTransfer.files[0]]));
      $("poses").prepend(...offered(poses));
      use(poses[0][1]);
      say(text);
    });
  });

  // ------------------------------------------------------------------------------------ sampling

  // Draws and shows the images; `onstep` gets the share of the steps made. A newer request ends it.
  async function sample(signal, onstep, extra = {}) {
    const response = await call("draw", {
      pose: editor.pose, label: form.label.value, n: +form.n.value, seed: +form.seed.value,
      guidance: +form.guidance.value, steps: +form.steps.value, ...extra }, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const { error, pictures, step, of } of lines.map(JSON.parse)) {
        if (error) throw new Error(error);
        if (pictures) showPictures(pictures);
        else onstep(step / of);
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
      await sample(drawing.signal, (share) => { $("drawing").value = share; });
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
    await sample(live.signal, () => {}, { n: 1, steps: Math.min(LIVE_STEPS, +form.steps.value) });
  });

  function showPictures(found) {
    $("pictures").replaceChildren(...found.map(([url, command], i) => make("figure", {},
      make("img", { src: url, alt: `Image ${i + 1}` }),
      make("div", {},
        make("a", { href: url, textContent: "Save", title: "with its command",
                    download: `seed-${command.match(/--seed (\d+)/)[1]}.png` }),
        make("button", { textContent: "Copy", title: `Copy: ${command}`,
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
        $("unusual").textContent = (await ask("unusual", { pose: editor.pose })).text;
      });
    }, PAUSE);
  }

  function key({ key, ctrlKey, metaKey }) {
    if (ctrlKey || metaKey) return false;
    if (key === "Enter") draw();
    else if (key === "x") editor.change(mirrored(editor.pose, about.mirror));
    else if (key === "l") $("live").click();
    else return false;
    return true;
  }
  $("sample").onclick = draw;
  $("mirror").onclick = () => key({ key: "x" });
  $("live").onchange = $("settings").onchange = changed;
  $("save-pose").onclick = () => {
    const pose = Object.fromEntries(about.joints.map((name, j) => [name, editor.pose[j]]));
    const href = `data:application/json,${encodeURIComponent(JSON.stringify(pose))}`;
    make("a", { href, download: "pose.json" }).click();
  };
  form.label.replaceChildren(...["", ...model.labels].map((value) => make("option",
    { value, textContent: value || "any" })));
  form.label.parentElement.hidden = !model.labels.length;
  form.guidance.disabled = !model.guided;
  form.guidance.value = model.guidance;
  form.steps.value = model.steps;
  $("poses").append(...offered(model.poses));
  if (modes.label) $("poses").prepend(make("button", { textContent: "the image in Label",
                                                       onclick: fromImage }));
  editor.open(model.poses[0][1], null, 1000, 1000);
  changed();
  return { editor, key, where: model.file };
}
