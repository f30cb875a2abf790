// Figures as people read them, the same as on the command line.

/** `0 B`, `1.5 KiB`. */
export function bytes(value) {
  if (value < 1024) return `${Math.round(value)} B`;
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let scaled = value / 1024;
  let unit = 0;
  while (scaled >= 1023.95 && unit + 1 < units.length) {
    scaled /= 1024;
    unit += 1;
  }
  return `${scaled.toFixed(1)} ${units[unit]}`;
}

/** `1,234,567`. */
export function count(value) {
  return Math.round(value).toLocaleString("en-US");
}

/** `1 record`, `7 records`. */
export function several(value, one, many) {
  return value === 1 ? `1 ${one}` : `${count(value)} ${many}`;
}

/** A length of time in seconds: `350 ms`, `2.5 s`, `3 min 5 s`, `2 h 3 min`, `5 d 2 h`. */
export function time(value) {
  if (!Number.isFinite(value)) return "?";
  const seconds = Math.max(0, value);
  const whole = Math.floor(seconds);
  if (seconds < 0.001) return "0 s";
  if (whole < 1) return `${Math.floor(seconds * 1000)} ms`;
  if (whole < 10) return `${whole}.${Math.floor((seconds - whole) * 10)} s`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

// Moments are nanoseconds since the epoch; a number of JavaScript's holds them to
// some 256 of them.
const ROUNDED = 256;

/** Seconds from `then` to `now`. */
export function between(then, now) {
  return (now - then) / 1e9;
}

/** `3 min 5 s ago`. */
export function ago(then, now) {
  return `${time(between(then, now))} ago`;
}

/** As the command line has it: `2026-11-21T08:15:30.250Z`. */
export function iso(moment) {
  return new Date(Math.floor((moment + ROUNDED) / 1e6)).toISOString();
}

/** `2026-11-21 08:15:30.250 UTC`. */
export function moment(at) {
  return iso(at).replace("T", " ").replace("Z", " UTC");
}

/** The same without the day, if that is today. */
export function timeOfDay(at, now) {
  const [whole, today] = [moment(at), moment(now)];
  return whole.slice(0, 10) === today.slice(0, 10) ? whole.slice(11) : whole;
}

/** `08:15:30` of milliseconds since the epoch. */
export function clock(milliseconds) {
  return new Date(milliseconds).toISOString().slice(11, 19);
}
