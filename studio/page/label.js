// Label: the strip of images, what is shown of one, saving, and proposals.
import { $, ask, attempt, make, say } from "./app.js";
import { Editor, copied, isEmpty, mirrored, newHistory } from "./skeleton.js";

const FILTERS = { todo: "To do", proposed: "Proposed", corrected: "Corrected", done: "Done",
                  suspects: "Suspects", all: "All" };
const LEAST = 20, GROWTH = 1.5;     // images done, before the first and before another round

export async function startLabel(about) {
  const { folder, labels, images } = await ask("images");
  const items = images.map(([name, state, confidence, rank], i) => (
    { i, name, state, confidence, rank, told: null }));     // told: its label, once it was opened
  let suspects = {}, order = [], current = -1, previous = -1, wanted = -1;
  let next = LEAST, training = false;
  const editor = new Editor($("image"), about, () => change(), $("hint"));

  // ---------------------------------------------------------------------------------- the strip

  const has = (item, filter) => filter === "all" || item.state === filter
    || (filter === "suspects" && item.i in suspects);
  const percent = (item) => `${Math.round(100 * item.confidence)} %`;

  // The button of an image in the strip, as its state is now.
  function entry(item) {
    item.button ??= make("button", { role: "option", title: item.name, tabIndex: -1,
                                     onclick: () => attempt(() => open(item.i)) },
      make("img", { loading: "lazy", alt: "", src: `api/thumb/${item.i}` }), make("span"));
    item.button.dataset.state = item.state;
    item.button.lastChild.textContent = item.state === "proposed" ? percent(item)
      : item.name.split("/").pop();
    item.button.setAttribute("aria-selected", item.i === current);
    return item.button;
  }

  // Fills the strip; counts stand in the filter.
  function list() {
    const names = [$("filter").value, "proposed", ...Object.keys(FILTERS)];
    const filter = names.find((name) => items.some((item) => has(item, name)));
    $("filter").replaceChildren(...Object.entries(FILTERS).map(([value, text]) => make("option", {
      value, selected: value === filter,
      textContent: `${text} ${items.filter((item) => has(item, value)).length}` })));
    order = items.filter((item) => has(item, filter));
    if (filter === "todo" || filter === "proposed") order.sort((a, b) => a.rank - b.rank);
    $("strip").replaceChildren(...order.map(entry));
  }

  // ---------------------------------------------------------------------------------- an image

  async function open(i, again = false) {
    const item = items[i], image = make("img", { src: `api/image/${i}` });
    wanted = i;
    const shown = image.decode().catch(() => {});
    if (again || !item.told) {
      item.told = { ...await ask(`pose/${i}`), history: newHistory(), changes: 0, saved: 0 };
      item.state = item.told.state;
    }
    await shown;
    if (wanted !== i) return;                   // another one was chosen meanwhile
    const { pose, size, history, problem } = item.told;
    if (current !== i) [previous, current] = [current, i];
    if (previous >= 0) entry(items[previous]);
    say(problem || (image.naturalWidth ? "" : "this image cannot be read"), true);
    editor.open(pose, image, ...size, history);
    $("name").textContent = item.name;
    describe(item);
    item.button.scrollIntoView({ block: "nearest", inline: "nearest" });
    if (item.state === "todo" && isEmpty(pose)) editor.placeNext(-1);
  }

  function describe(item) {
    entry(item);
    const { size, pose } = item.told, why = suspects[item.i];
    $("about").textContent = `${size.join(" × ")} pixels. ` + { todo: "To do.",
      done: isEmpty(pose) ? "Done: nobody is in it." : "Done.",
      proposed: `Proposed, confidence ${percent(item)}.`,
      corrected: "Changed, not done yet." }[item.state]
      + (why ? ` The dataset check says: ${why}` : "");
  }

  // After a change by hand: unfinished work is "corrected", an image done stays done. Saves it;
  // saves of an image are made one after the other. Returns whether it worked.
  function change(state) {
    const item = items[current], { told } = item, { pose } = editor, mine = ++told.changes;
    told.pose = pose;
    state ??= item.state === "done" && !isEmpty(pose) ? "done" : "corrected";
    item.state = state;
    describe(item);
    told.saving = Promise.resolve(told.saving).then(async () => {
      try {
        ({ version: told.version } = await ask(`pose/${item.i}`, { pose, state,
                                                                   version: told.version }));
        if (told.saved + 1 < mine) say("");     // the ones before had failed
        told.saved = mine;
      } catch (error) {
        say(`Not saved: ${error.message}`, true);
      }
      return told.saved === mine;
    });
    return told.saving;
  }
  const unsaved = ({ told }) => told && told.saved < told.changes;
  addEventListener("beforeunload", (event) => {
    if (items.some(unsaved)) event.preventDefault();
  });

  function step(by) {
    const to = order[order.indexOf(items[current]) + by];
    if (to) attempt(() => open(to.i));
  }

  // Enter: this one is done; then the next one of the same filter.
  async function done() {
    const item = items[current], at = Math.max(order.indexOf(item), 0);
    if (editor.placing >= 0) {                  // an Enter too early; the second one counts
      const n = editor.pose.filter((joint) => joint[2]).length;
      editor.place(-1);
      return say(n ? `${n} of 17 joints are placed. Enter again to mark the others as missing`
        : "Enter again: nobody is in this image", true);
    }
    say("");
    if (!await change("done")) return;
    list();
    const to = order[order[at] === item ? at + 1 : at] ?? order[0];
    await open(to.i);
    const left = items.filter((other) => other.state !== "done").length;
    if (!left) say(`All are done. Next: python data.py ${folder}`);
    else if (items.length - left >= next && !training) propose();
  }

  function copyBefore() {
    if (items[previous]?.told) editor.change(copied(items[previous].told.pose));
    editor.place(-1);
  }

  function key({ key, ctrlKey, metaKey }) {
    const does = { Enter: done, PageDown: () => step(1), PageUp: () => step(-1), f: copyBefore,
                   m: () => editor.change(mirrored(editor.pose, about.mirror, true)),
                   r: () => open(current, true) }[key.length > 1 ? key : key.toLowerCase()];
    if (!does || ctrlKey || metaKey || current < 0) return false;
    attempt(does);
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
    const { value } = $("filter");
    if (value === "suspects") {
      say("Checking the images that are done …");
      ({ suspects } = await ask("suspects"));
    }
    list();
    if (order.length) await open(order[0].i);
    if (value !== $("filter").value) say(`No images: ${FILTERS[value]}`);
    $("image").focus();
  });

  // ---------------------------------------------------------------------------------- proposals

  const propose = () => attempt(async () => {
    await ask("propose", { stop: training });
    training = true;                            // it may be over before it is seen
    await watch();
  });
  $("propose").onclick = () => { propose(); $("image").focus(); };

  // Shows the progress until the training ends; then proposals are in the files.
  async function watch() {
    const now = await ask("progress"), ended = training && !now.training;
    training = now.training;
    $("bar").hidden = !training;
    $("bar").value = now.share ?? 0;
    $("propose").textContent = training ? "Stop" : "Propose";
    $("progress").textContent = now.text || `Once ${LEAST} images are done, a detector learns from `
      + "them and proposes the joints of the others.";
    if (now.done) next = Math.ceil(now.done * GROWTH);
    if (ended) await reload();
    if (training) setTimeout(() => attempt(watch), 500);
  }

  // Takes over the states from the server, but for images with work that is not saved.
  async function reload() {
    for (const [i, [, state, confidence, rank]] of (await ask("images")).images.entries()) {
      if (unsaved(items[i])) continue;
      Object.assign(items[i], { state, confidence, rank });
      if (state === "proposed") items[i].told = null;
    }
    if ($("filter").value === "todo") $("filter").value = "proposed";
    list();
    if (current >= 0 && !items[current].told) await open(current);
  }

  list();
  await watch();
  await attempt(() => open(order[0].i));
  return { editor, key, where: `labels in ${labels}`,
           pose: () => ({ pose: editor.pose, width: editor.width, height: editor.height }) };
}
