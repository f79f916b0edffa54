// One set of controls plays all videos of a gallery that are in view, within a frame of each other.
"use strict";

function gallery(root) {
  const find = (name) => root.querySelector(name);
  const videos = [...root.querySelectorAll("video")];
  const frames = Number(root.dataset.frames);
  const fps = Number(root.dataset.fps);
  const [play, scrub, shown, speed, loop] =
    [".play", ".scrub", "output", ".speed", ".loop"].map(find);
  const inView = new Set();
  let frame = 0;
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  let attempt = 0;  // Counts starts: an older one that still waits for its videos gives up.
  let regrouped = 0;
  let told = "";

  // Of a video whose metadata is on its way nothing is known yet: the others do not wait for it.
  const active = () =>
    videos.filter((video) => inView.has(video) && video.readyState >= 1 && !video.error);
  // The middle of a frame: no rounding, ours or the decoder's, shows the one beside it.
  const middle = (video) => {
    const time = (frame + 0.5) / fps;
    return Number.isFinite(video.duration) ? Math.min(time, video.duration - 0.25 / fps) : time;
  };
  const leader = () =>
    active().reduce((best, video) => (best?.duration >= video.duration ? best : video), null);

  function tell() {
    const now = `${playing} ${frame}`;
    if (now === told) return;
    told = now;
    play.textContent = playing ? "Pause" : "Play";
    scrub.value = frame;
    scrub.setAttribute("aria-valuetext", `frame ${frame + 1} of ${frames}`);
    shown.textContent = `${frame + 1} / ${frames}`;
  }

  function show(next) {
    frame = Math.max(0, Math.min(frames - 1, next));
    for (const video of active()) video.currentTime = middle(video);
    tell();
  }

  // Resolves when the video shows the frame it was sent to; a damaged one is not waited for.
  function settled(video) {
    const ready = () => video.error || (!video.seeking && video.readyState >= 2);
    return new Promise((resolve) => {
      const events = ["seeked", "loadeddata", "canplay", "error"];
      const done = () => {
        for (const name of events) video.removeEventListener(name, check);
        clearTimeout(late);
        resolve();
      };
      const check = () => { if (ready()) done(); };
      const late = setTimeout(done, 3000);
      for (const name of events) video.addEventListener(name, check);
      check();
    });
  }

  // All stop, go to one frame, and leave together when the last is there.
  async function start() {
    const mine = ++attempt;
    for (const video of videos) video.pause();
    show(frame);
    await Promise.all(active().map(settled));
    if (mine !== attempt || !playing) return;
    regrouped = performance.now();
    for (const video of active()) {
      video.playbackRate = Number(speed.value);
      video.play().catch((refusal) => {  // To save power, say: the controls still step and scrub.
        if (refusal.name === "NotAllowedError" && mine === attempt) stop(frame);
      });
    }
    requestAnimationFrame(() => follow(mine));
  }

  function stop(at) {
    playing = false;
    attempt += 1;
    for (const video of videos) video.pause();
    show(at);
  }

  function follow(mine) {
    const first = leader();
    if (mine !== attempt || !first) return;  // What comes into view starts again.
    frame = Math.min(frames - 1, Math.floor(first.currentTime * fps));
    tell();
    if (first.ended) {
      if (!loop.checked) return stop(frames - 1);
      frame = 0;
      return start();
    }
    const apart = active().map((video) =>
      Math.abs(Math.min(first.currentTime, video.duration) - video.currentTime));
    if (Math.max(...apart) > 0.6 / fps && performance.now() - regrouped > 400) return start();
    requestAnimationFrame(() => follow(mine));
  }

  const step = (by) => stop(frame + by);
  const toggle = () => {
    if (playing) return stop(frame);
    playing = true;
    if (!loop.checked && frame === frames - 1) frame = 0;
    start();
  };

  play.onclick = toggle;
  find(".back").onclick = () => step(-1);
  find(".forward").onclick = () => step(1);
  scrub.oninput = () => stop(Number(scrub.value));
  speed.onchange = () => { if (playing) start(); };
  root.addEventListener("keydown", (event) => {
    // Controls keep the keys that are theirs: a slider its arrows, a button its space.
    if (event.target !== root || event.ctrlKey || event.altKey || event.metaKey) return;
    const acts = { " ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  });

  const regroup = () => { if (playing) start(); else show(frame); };
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) { inView.add(target); continue; }
      inView.delete(target);
      target.pause();
    }
    regroup();
  });
  for (const video of videos) {
    video.controls = false;
    video.onclick = toggle;
    video.addEventListener("loadedmetadata", () => { if (inView.has(video)) regroup(); });
    watcher.observe(video);
  }
  find(".controls").hidden = !videos.length;
  tell();
}

document.querySelectorAll(".gallery").forEach(gallery);
