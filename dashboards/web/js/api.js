// The daemon's API as the page may use it: reads, and one stream that comes back by itself.

export class ApiError extends Error {
  constructor(status, view) {
    super(view.message);
    Object.assign(this, { status, code: view.code, hint: view.hint ?? "" });
  }
}

export async function get(path, signal) {
  const response = await fetch(path, { signal, credentials: "same-origin", cache: "no-store" });
  const body = await response.text();
  if (response.ok) return JSON.parse(body);
  let view = { code: "session", message: body.trim() || `HTTP ${response.status}` };
  try { view = JSON.parse(body).error ?? view; } catch { /* the page's own server speaks plain text */ }
  throw new ApiError(response.status, view);
}

const FIRST_WAIT_S = 0.5, LONGEST_WAIT_S = 15, SILENCE_S = 12;

// Calls back: snapshot(view), event(event), state("live" | "down", why). Events missed while away are fetched, none shown twice.
export class Stream {
  constructor(hz, handlers) {
    this.path = `/v1/stream?hz=${hz}`;
    this.handlers = handlers;
    this.seq = null;
    this.wait = FIRST_WAIT_S;
    this.open();
  }

  open() {
    clearTimeout(this.timer);
    const source = (this.source = new EventSource(this.path));
    this.heard();
    source.onopen = async () => {
      this.heard();
      this.wait = FIRST_WAIT_S;
      this.handlers.state("live");
      if (this.seq === null) return;
      try {
        let missed = await get(`/v1/events?since=${this.seq}&limit=200`);
        if (!missed.length && (await get("/v1/events?limit=1")).every((event) => event.seq < this.seq)) this.seq = null; // it was restarted
        missed.forEach((event) => this.take(event));
      } catch { /* the next loss of the stream says why */ }
    };
    source.onerror = () => { if (source === this.source) this.lost(); };
    source.addEventListener("snapshot", (message) => { this.heard(); this.handlers.snapshot(JSON.parse(message.data)); });
    source.addEventListener("event", (message) => { this.heard(); this.take(JSON.parse(message.data)); });
    source.addEventListener("heartbeat", () => this.heard());
  }

  take(event) {
    if (this.seq !== null && event.seq <= this.seq) return;
    this.seq = event.seq;
    this.handlers.event(event);
  }

  heard() {
    clearTimeout(this.watchdog);
    this.watchdog = setTimeout(() => this.lost(), SILENCE_S * 1000);
  }

  async lost() {
    clearTimeout(this.watchdog);
    this.source.close();
    this.source = null;
    const wait = this.wait * (0.75 + Math.random() / 2);
    this.wait = Math.min(LONGEST_WAIT_S, this.wait * 2);
    this.timer = setTimeout(() => this.open(), wait * 1000);
    let why = "no answer from powerctl: is `powerctl dashboard` still running?";
    let again = true;
    try {
      await get("/v1/node");
      why = "the stream broke";
    } catch (error) {
      if (error instanceof ApiError) {
        why = error.code === "session" ? `${error.message.replace(/^powerd: /, "")}` : [error.message, error.hint].filter(Boolean).join("; ");
        again = error.code !== "session";
      }
    }
    if (!again) clearTimeout(this.timer);
    this.handlers.state("down", why, again ? wait : null);
  }
}

// Calls a function every so often while somebody looks, at once when asked, never twice at a time.
export class Poll {
  constructor(seconds, action) {
    this.seconds = seconds;
    this.action = action;
    this.busy = this.again = false;
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.now(); });
    this.now();
  }

  async now() {
    if (this.busy) { this.again = true; return; }
    clearTimeout(this.timer);
    this.busy = true;
    try { await this.action(); } catch (error) { if (!(error instanceof ApiError || error instanceof TypeError)) console.error(error); }
    this.busy = false;
    if (this.again) { this.again = false; this.now(); return; }
    this.timer = setTimeout(() => { if (!document.hidden) this.now(); }, this.seconds * 1000);
  }
}
