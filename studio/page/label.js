// Label: the strip of images, what is shown of one, saving, and proposals.
import { $, ask, attempt, make, say } from "./app.js";
import { Editor, isEmpty, mirrored } from "./skeleton.js";

const FILTERS = { todo: "To do", proposed: "Proposed", corrected: "Corrected", done: "Done",
                  suspects: "Suspects", all: "All" };
const CHUNK = 100;                  // images by which the strip grows
const LEAST = 20, GROWTH = 1.5;     // images done, before the first and before another round

export async function startLabel(about) {
  const { folder, labels, images } = await ask("images");
  const items = images.map(([name, state, confidence, rank], i) => (
    { i, name, state, confidence, rank }));
  const loaded = new Map();         // by image: pose, version and history, once it was opened
  let suspects = {}, order = [], current = -1, wanted = -1, next = LEAST, training = false;
  const editor = new Editor($("image"), about, () => change(), $("hint"));

  // ---------------------------------------------------------------------------------- the strip

  const has = (item, filter) => filter === "all" || item.state === filter
    || (filter === "suspects" && item.i in suspects);

  // The button of an image in the strip, as its state is now.
  function entry(item) {
    item.button ??= make("button", { role: "option", title: item.name, tabIndex: -1,
                                     onclick: () => attempt(() => open(item.i)) },
      make("img", { loading: "lazy", alt: "", src: `api/thumb/${item.i}` }), make("span"));
    item.button.dataset.state = item.state;
    item.button.lastChild.textContent = item.state === "proposed"
      ? `${(100 * item.confidence).toFixed(0)} %` : item.name.split("/").pop();
    item.button.setAttribute("aria-selected", item.i === current);
    return item.button;
  }

  // Lengthens the strip, so that thousands of images cost nothing before they are scrolled to.
  const more = (count = CHUNK) => {
    const from = $("strip").childElementCount;
    $("strip").append(...order.slice(from, from + count).map(entry));
  };
  $("strip").onscroll = () => {
    const { scrollTop, scrollLeft, scrollHeight, scrollWidth, clientHeight, clientWidth }
      = $("strip");
    if (scrollHeight - scrollTop < 3 * clientHeight || (scrollWidth > clientWidth
        && scrollWidth - scrollLeft < 3 * clientWidth)) more();
  };

  // Fills the strip; counts stand in the filter.
  function list() {
    const names = [$("filter").value, "proposed", ...Object.keys(FILTERS)];
    const filter = names.find((name) => name && items.some((item) => has(item, name)));
    $("filter").replaceChildren(...Object.entries(FILTERS).map(([value, text]) => make("option", {
      value, selected: value === filter,
      textContent: `${text} ${items.filter((item) => has(item, value)).length}` })));
    order = items.filter((item) => has(item, filter));
    if (filter === "todo" || filter === "proposed") order.sort((a, b) => a.rank - b.rank);
    const shown = $("strip").childElementCount;
    $("strip").replaceChildren();
    more(Math.max(shown, CHUNK));
  }

  // ---------------------------------------------------------------------------------- an image

  async function open(i, again = false) {
    const item = items[i], image = new Image();
    wanted = i;
    image.src = `api/image/${i}`;
    const shown = image.decode().catch(() => {});
    if (again || !loaded.has(i)) {
      const found = await ask(`pose/${i}`);
      loaded.set(i, { ...found, history: { past: [], future: [] } });
      item.state = found.state;
    }
    await shown;
    if (wanted !== i) return;                   // another one was chosen meanwhile
    const before = current;
    current = i;
    const { pose, size, history, problem } = loaded.get(i);
    say(problem || (image.naturalWidth ? "" : "this image cannot be read"), true);
    editor.open(pose, image, ...size, history);
    if (items[before]?.button) entry(items[before]);
    more(order.indexOf(item) + CHUNK - $("strip").childElementCount);
    entry(item).scrollIntoView({ block: "nearest", inline: "nearest" });
    $("name").textContent = item.name;
    describe(item);
    if (item.state === "todo" && isEmpty(pose)) editor.key({ key: "p" });
  }

  function describe(item) {
    entry(item);
    const [w, h] = loaded.get(item.i).size;
    const nobody = isEmpty(loaded.get(item.i).pose);
    $("about").textContent = `${w} × ${h} pixels. ` + { todo: "To do.",
      done: nobody ? "Done: nobody is in it." : "Done.",
      proposed: `Proposed, confidence ${(100 * item.confidence).toFixed(0)} %.`,
      corrected: "Changed, not done yet." }[item.state] + (suspects[item.i] ?
      ` The dataset check says: ${suspects[item.i]}` : "");
  }

  // After a change by hand: unfinished work is "corrected", an image done stays done.
  function change(state) {
    const item = items[current], told = loaded.get(current);
    told.pose = editor.pose;
    item.state = state || (item.state === "done" ? "done" : "corrected");
    describe(item);
    return save(item);
  }

  // One save at a time for each image; what changes meanwhile is saved after it.
  async function save(item) {
    const told = loaded.get(item.i);
    told.unsaved = true;
    if (told.saving) return told.saving;
    told.saving = (async () => {
      while (told.unsaved) {
        told.unsaved = false;
        try {
          const { version } = await ask(`pose/${item.i}`, {
            pose: told.pose, state: item.state, version: told.version });
          told.version = version;
          if ($("message").className) say("");
        } catch (error) {
          told.failed = true;
          say(`Not saved: ${error.message}`, true);
          throw error;
        }
        told.failed = false;
      }
    })().finally(() => { told.saving = null; });
    return told.saving.catch(() => {});
  }
  addEventListener("beforeunload", (event) => {
    if ([...loaded.values()].some((told) => told.failed || told.saving)) event.preventDefault();
  });

  function step(by) {
    const at = order.findIndex((item) => item.i === current);
    const to = order[Math.min(Math.max(at + by, 0), order.length - 1)];
    if (to) attempt(() => open(to.i));
  }

  // Enter: this one is done; then the next one of the same filter.
  async function done() {
    const at = order.findIndex((item) => item.i === current), item = items[current];
    previous = current;
    await change("done");
    if (loaded.get(item.i).failed) return;
    list();
    const to = order[has(item, $("filter").value) ? at + 1 : Math.max(at, 0)] ?? order[0];
    if (to) await open(to.i);
    else say("All of them are done; choose another group above the strip");
    const count = items.filter((other) => other.state === "done").length;
    if ($("auto").checked && count >= next && !training) propose();
  }
  let previous = -1;

  async function copyBefore() {
    const from = previous >= 0 && previous !== current ? previous : current - 1;
    if (from < 0) return;
    const { pose } = loaded.get(from) ?? await ask(`pose/${from}`);
    editor.change(pose.map((joint) => [...joint]));
    editor.place(-1);
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || current < 0) return false;
    const { key } = event, letter = key.toLowerCase();
    if (key === "Enter") attempt(done);
    else if (key === "PageDown" || key === "PageUp") step(key === "PageDown" ? 1 : -1);
    else if (letter === "m") editor.change(mirrored(editor.pose, about.mirror, true));
    else if (letter === "f") attempt(copyBefore);
    else if (letter === "r") attempt(() => open(current, true));
    else return false;
    return true;
  }
  for (const button of $("tools").children) {
    button.onclick = () => {
      const event = { key: button.dataset.key, ctrlKey: !!button.dataset.ctrl };
      if (!editor.key(event)) key(event);
      $("image").focus();
    };
  }
  $("filter").onchange = () => attempt(async () => {
    const checking = $("filter").value === "suspects";
    if (checking) {
      say("Checking the images that are done …");
      ({ suspects } = await ask("suspects"));
    }
    list();
    if (order.length) await open(order[0].i);
    if (checking && !Object.keys(suspects).length) say("The dataset check found no suspects");
    $("image").focus();
  });

  // ---------------------------------------------------------------------------------- proposals

  const propose = () => attempt(async () => {
    await ask("propose", { stop: training });
    training = true;                            // it may be over before it is seen
    await watch();
  });
  $("propose").onclick = propose;

  // Shows the progress until the training ends; then proposals are in the files.
  async function watch() {
    const now = await ask("progress");
    const ended = training && !now.training;
    training = now.training;
    $("bar").hidden = !training;
    $("bar").value = now.share ?? 0;
    $("propose").textContent = training ? "Stop" : "Propose";
    $("progress").textContent = now.text || `From ${LEAST} images done on, a detector learns from `
      + "them and proposes the joints of the others.";
    if (now.done) next = Math.ceil(now.done * GROWTH);
    if (ended) await reload();
    if (training) setTimeout(() => attempt(watch), 500);
  }

  // Takes over the states from the server, but for images with work that is not saved.
  async function reload() {
    for (const [i, [, state, confidence, rank]] of (await ask("images")).images.entries()) {
      if (loaded.get(i)?.saving) continue;
      Object.assign(items[i], { state, confidence, rank });
      if (state === "proposed") loaded.delete(i);
    }
    if ($("filter").value === "todo") $("filter").value = "proposed";
    list();
    if (!loaded.has(current)) await open(current);
  }

  list();
  await watch();
  if (order.length) await attempt(() => open(order[0].i));
  return { editor, key, where: `${folder} · labels in ${labels}`,
           pose: () => ({ pose: editor.copy(), width: editor.width, height: editor.height }) };
}
