// What the page shows and does. The model itself computes in a worker (model.js, worker.js); this asks it and draws.
'use strict';

const $ = id => document.getElementById(id);
const record = JSON.parse($('record').textContent);
const {shape, characters} = record, {V, T, L, NH} = shape;
const half = Math.max(1, T >> 1);

// An element with properties and children, which are elements or texts.
function element(tag, properties = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    name in e ? e[name] = value : e.setAttribute(name, value);
  e.append(...children);
  return e;
}
const percent = p => `${(100 * p).toPrecision(p < 0.0995 ? 2 : 3)} %`;
const number = n => n.toLocaleString('en');

// ---------------------------------------------------------------------------------------------------------------------
// Characters and tokens

const tokenOf = new Map(characters.map((code, token) => [code, token]));
const letter = token => String.fromCodePoint(characters[token]);
const decode = tokens => tokens.map(letter).join('');

// For a person to look at: what is invisible gets a sign or a name.
function shown(token) {
  const signs = {10: '↵', 32: '␣', 9: '⇥'}, code = characters[token];
  if (signs[code]) return signs[code];
  return /[\p{C}\p{Z}\p{M}]/u.test(letter(token)) ? 'U+' + code.toString(16).toUpperCase().padStart(4, '0') : letter(token);
}

// The tokens of a text, and the characters in it that the model does not know, each once.
function encode(text) {
  const tokens = [], unknown = new Set();
  for (const c of text) {
    const token = tokenOf.get(c.codePointAt(0));
    token === undefined ? unknown.add(c) : tokens.push(token);
  }
  return {tokens, unknown: [...unknown]};
}

// ---------------------------------------------------------------------------------------------------------------------
// The worker: ask(what, request) promises its answer. heard, if given, is called for each message of an answer in parts.

const worker = new Worker(URL.createObjectURL(new Blob([$('worker').textContent], {type: 'text/javascript'})));
const open = new Map();
let asked = 0;

function ask(what, request = {}, heard = null) {
  asked++;
  worker.postMessage({number: asked, what, request});
  return new Promise(resolve => open.set(asked, {resolve, heard}));
}
worker.onmessage = ({data}) => {
  const {resolve, heard} = open.get(data.number);
  if (heard) heard(data);
  if (heard && !data.done) return;
  open.delete(data.number);
  resolve(data);
};
worker.onerror = event => {
  $('about').textContent = `The model cannot be computed here: ${event.message || 'this browser refuses the worker'}`;
  $('about').className = 'broken';
};

// ---------------------------------------------------------------------------------------------------------------------
// Type, and see it think

let tokens = [];  // the text
let begin = 0;    // where the window begins that the model sees: tokens before it are out of its sight
let chosen = 0;   // a token of the text
let looked = null;  // the worker's answer about the window

function textChanged() {
  const {tokens: all, unknown} = encode($('text').value);
  tokens = all;
  // When the window is full, the older half of it is let go, so that what the model knows of the rest can be used again.
  begin = tokens.length > T ? Math.ceil((tokens.length - T) / half) * half : 0;
  const caret = encode($('text').value.slice(0, $('text').selectionStart)).tokens.length;
  chosen = Math.min(Math.max(begin, caret - 1), tokens.length - 1);
  $('note').textContent = [
    unknown.length ? `Left out, because the model knows ${number(V)} characters and not: ${unknown.join(' ')}` : '',
    tokens.length ? '' : 'Type something: the model needs a character to go on from.',
    begin ? `The model sees the last ${tokens.length - begin} characters; the others are grey.` : '',
  ].filter(Boolean).join(' ');
  refresh();
}

// Asks about the text as it is, again if it has changed meanwhile, and for the maps once it rests.
let busy = false, again = false;
async function refresh() {
  showCommand();
  again = true;
  if (busy) return;
  busy = true;
  while (again) {
    again = false;
    looked = null;
    if (tokens.length) looked = {...await ask('look', {tokens: tokens.slice(begin), at: chosen - begin}), begin, tokens};
    if (again) continue;
    showCharacters();
    showNext();
    showLayers();
    if (looked) maps = await ask('attention');
    if (!again) showMaps();
  }
  busy = false;
}

function choose(at) {
  chosen = Math.min(Math.max(begin, at), tokens.length - 1);
  refresh();
}

function lossOf(at) { return looked && at > begin ? looked.losses[at - begin] : NaN; }

function showCharacters() {
  const worst = Math.max(1, Math.log(V));
  $('characters').replaceChildren(...tokens.map((token, at) => {
    const loss = lossOf(at), c = element('span', {}, characters[token] === 10 ? '↵\n' : letter(token));
    if (at < begin) c.className = 'unseen';
    if (at === chosen) c.className = 'chosen';
    if (!Number.isNaN(loss)) {
      c.style.background = `rgb(var(--surprise) / ${(0.75 * Math.min(1, loss / worst)).toFixed(2)})`;
      c.title = `${shown(token)}: ${loss.toFixed(2)} nats, ${percent(Math.exp(-loss))}`;
    }
    c.onclick = () => choose(at);
    return c;
  }));
  const slider = $('characters'), loss = lossOf(chosen);
  slider.setAttribute('aria-valuemax', Math.max(1, tokens.length));
  slider.setAttribute('aria-valuenow', chosen + 1);
  slider.setAttribute('aria-valuetext', !tokens.length ? 'none' : `${shown(tokens[chosen])}, ${chosen + 1} of ${tokens.length}` +
      (Number.isNaN(loss) ? '' : `, surprise ${loss.toFixed(2)} nats`));
  const known = looked ? [...looked.losses.slice(1)] : [];
  $('mean').textContent = known.length ?
      `${(known.reduce((a, b) => a + b) / known.length).toFixed(2)} nats a character, ${looked.ms.toFixed(0)} ms` : '';
}

$('characters').onkeydown = event => {
  const steps = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity};
  if (!(event.key in steps) || !tokens.length) return;
  event.preventDefault();
  choose(chosen + steps[event.key]);
};

function showNext() {
  const truth = tokens[chosen + 1];
  $('next').replaceChildren();
  $('next-title').textContent = looked ? `What comes after ${shown(tokens[chosen])}?` : 'What comes next?';
  if (!looked) return;
  const {best, truth: p} = looked.next;
  const rows = best.some(([token]) => token === truth) || truth === undefined ? best : [...best, [truth, p]];
  for (const [token, q] of rows) {
    const bar = element('div', {className: 'bar'});
    bar.style.width = `${100 * q}%`;
    const sign = token === truth ? 'truth' : '';
    $('next').append(element('code', {className: sign}, shown(token)), bar,
                     element('span', {className: sign}, percent(q) + (sign ? ', and it does' : '')));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Who looks at whom

let maps = null;           // {heads: [layer][head] (n, n), n}
let layer = 0, head = 0;   // the map that is enlarged
let row = 0, column = 0;   // the cell in it that is spoken of, in tokens of the window

const colour = name => {  // of the style sheet, as [red, green, blue]
  const probe = document.body.appendChild(element('span'));
  probe.style.color = `var(${name})`;
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return parts;
};
let plain, accent;  // asking for them takes time, so once for all maps

// A pixel a cell: the darker, the more the row's token looks at the column's; the chosen row in another colour.
function picture(map, n) {
  const image = new ImageData(n, n), pixels = image.data;
  for (let t = 0; t < n; t++) {
    const [red, green, blue] = t === chosen - begin ? accent : plain;
    for (let u = 0, at = t * n; u <= t; u++, at++) {
      pixels[4 * at] = red, pixels[4 * at + 1] = green, pixels[4 * at + 2] = blue;
      pixels[4 * at + 3] = 255 * Math.sqrt(map[at]);
    }
  }
  return image;
}

function showMaps() {
  if (!maps) return;
  const grid = $('heads'), {heads, n} = looked ? maps : {heads: [], n: 0};
  if (looked && !heads) $('head-title').textContent = 'This model has too many positions to keep maps of all heads.';
  grid.style.gridTemplateColumns = `max-content repeat(${NH}, minmax(3rem, 8rem))`;
  if (grid.childElementCount !== (heads ? heads.length : 0) * (NH + 1)) {  // made once; then only drawn
    grid.replaceChildren(...(heads || []).flatMap((_, l) => [
      element('span', {className: 'layer'}, `layer ${l + 1}`),
      ...Array.from({length: NH}, (_, h) => {
        const button = element('button', {'aria-label': `layer ${l + 1}, head ${h + 1}`}, element('canvas'));
        button.onclick = () => { layer = l, head = h; showMaps(); };
        return button;
      })]));
  }
  if (!looked || !heads) return $('map').height = 0;
  plain = colour('--text'), accent = colour('--accent');
  grid.querySelectorAll('button').forEach((button, i) => {
    const canvas = button.firstChild;
    canvas.width = canvas.height = n;
    canvas.getContext('2d').putImageData(picture(heads[Math.floor(i / NH)][i % NH], n), 0, 0);
    button.setAttribute('aria-pressed', i === layer * NH + head);
  });
  row = chosen - begin, column = heads[layer][head].slice(row * n, row * n + row + 1).reduce(
      (best, weight, u, weights) => weight > weights[best] ? u : best, 0);
  showEnlarged();
  const box = $('enlarged');
  box.scrollTop = row * cellSize(n) - box.clientHeight / 2, box.scrollLeft = row * cellSize(n) - box.clientWidth / 2;
}

const cellSize = n => Math.max(1, Math.min(16, Math.floor(4000 / n)));

function showEnlarged() {
  const {heads, n} = maps, cell = cellSize(n), label = cell >= 8 ? cell + 4 : 0, size = label + n * cell;
  const canvas = $('map'), zoom = Math.min(window.devicePixelRatio || 1, 2), pen = canvas.getContext('2d');
  canvas.width = canvas.height = size * zoom;
  canvas.style.width = canvas.style.height = `${size}px`;
  pen.scale(zoom, zoom);
  const small = new OffscreenCanvas(n, n);
  small.getContext('2d').putImageData(picture(heads[layer][head], n), 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, label, label, n * cell, n * cell);
  pen.strokeStyle = pen.fillStyle = `rgb(${plain})`;
  pen.font = `${cell - 3}px ui-monospace, monospace`;
  pen.textAlign = 'center', pen.textBaseline = 'middle';
  for (let t = 0; t < n && label; t++) {
    const sign = [...shown(tokens[begin + t])].length > 1 ? '?' : shown(tokens[begin + t]);
    pen.fillText(sign, label + (t + 0.5) * cell, label / 2);
    pen.fillText(sign, label / 2, label + (t + 0.5) * cell);
  }
  pen.strokeRect(label + 0.5, label + row * cell + 0.5, n * cell - 1, cell);
  pen.strokeRect(label + column * cell + 0.5, label + row * cell + 0.5, cell, cell);
  $('head-title').textContent = `Layer ${layer + 1}, head ${head + 1}`;
  $('cell').textContent = `${shown(tokens[begin + row])} (${begin + row + 1}) looks at ${shown(tokens[begin + column])} (${
      begin + column + 1}): ${percent(heads[layer][head][row * n + column])}`;
  [...$('characters').children].forEach((c, at) =>
    c.classList.toggle('looked', at === begin + row || at === begin + column));
}

// Moves the cell that is spoken of. Nobody looks to the right.
function point(t, u) {
  if (!looked || !maps || !maps.heads) return;
  row = Math.min(Math.max(0, t), maps.n - 1), column = Math.min(Math.max(0, u), row);
  showEnlarged();
}
$('map').onmousemove = event => {
  if (!maps) return;
  const cell = cellSize(maps.n), label = cell >= 8 ? cell + 4 : 0;
  point(Math.floor((event.offsetY - label) / cell), Math.floor((event.offsetX - label) / cell));
};
$('enlarged').onkeydown = event => {
  const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}, step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  point(row + step[0], column + step[1]);
};

// ---------------------------------------------------------------------------------------------------------------------
// Layer by layer

function showLayers() {
  $('layers').replaceChildren();
  if (!looked) return;
  const truth = tokens[chosen + 1];
  const guess = ([token, p]) => {
    const cell = element('td', {}, element('span', {}, element('code', {}, shown(token)), ` ${percent(p)}`));
    cell.style.setProperty('--p', `${100 * p}%`);
    return cell;
  };
  const rows = looked.layers.map(({best, truth: p}, l) => element('tr', {},
      element('th', {scope: 'row'}, l === 0 ? 'embedding' : `layer ${l}`), ...best.map(guess),
      ...(truth === undefined ? [] : [element('td', {className: 'number'}, percent(p))])));
  const titles = ['after', ...looked.layers[0].best.map((_, i) => `guess ${i + 1}`),
                  ...(truth === undefined ? [] : [`${shown(truth)}, which comes`])];
  $('layers').append(element('table', {'aria-label': 'Guesses after each layer'},
      element('thead', {}, element('tr', {}, ...titles.map(t => element('th', {scope: 'col'}, t)))),
      element('tbody', {}, ...rows)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Write on

const settings = () => ({
  count: Math.max(1, Math.min(100000, Math.floor($('count').valueAsNumber) || 1)),
  temperature: Math.max(0, Math.min(100, $('temperature').valueAsNumber || 0)),
  topK: Math.max(0, Math.floor($('top-k').valueAsNumber) || 0),
  seed: /^\d{1,20}$/.test($('seed').value.trim()) && BigInt($('seed').value.trim()) < 2n ** 64n ? $('seed').value.trim() : null,
  exact: $('exact').checked,
});

function showCommand() {
  const {count, temperature, topK, seed} = settings();
  const quoted = `'${decode(tokens).replaceAll("'", `'\\''`)}'`;
  $('command').textContent = seed === null ? 'The seed is a whole number from 0 to 18446744073709551615.' :
      `./train_gpt sample --start ${quoted} --max_new_tokens ${count} --temperature ${temperature} --top_k ${topK} --seed ${seed}`;
  $('write').disabled = seed === null || !tokens.length || !$('stop').disabled;
}

$('write').onclick = async () => {
  const request = {tokens, ...settings()}, written = $('written'), before = performance.now();
  const parted = request.exact ? Infinity : Math.max(0, T + 1 - tokens.length);  // from this new character on
  let made = 0, tail = element('span');
  written.replaceChildren(decode(tokens), tail);
  $('parts').textContent = '';
  $('stop').disabled = false;
  showCommand();
  await ask('write', request, ({tokens: fresh}) => {
    const equal = Math.max(0, Math.min(fresh.length, parted - made));
    tail.append(decode(fresh.slice(0, equal)));
    if (equal < fresh.length && made <= parted) {
      written.append(tail = element('span', {className: 'parting'}));
      $('parts').textContent = `From the mark on, ${number(parted)} characters in, the page parts from the program: the ` +
          `model sees ${number(T)} characters, and when these are full the page lets go of the older half at once, which is fast.`;
    }
    tail.append(decode(fresh.slice(equal)));
    made += fresh.length;
    written.scrollTop = written.scrollHeight;
    $('speed').textContent = `${number(made)} characters, ${number(Math.round(1000 * made / (performance.now() - before)))} a second`;
  });
  $('stop').disabled = true;
  showCommand();
};
$('stop').onclick = () => ask('stop');
for (const id of ['count', 'temperature', 'top-k', 'seed']) $(id).oninput = showCommand;

// ---------------------------------------------------------------------------------------------------------------------
// How it learned

const svg = (tag, attributes, text = '') => {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  e.textContent = text;
  return e;
};

function showCurves() {
  const {evals, iters, final} = record.run;
  if (!evals.length) {
    $('learned-title').parentElement.replaceChildren($('learned-title'), element('p', {}, 'There is no record of this run.'));
    return;
  }
  const fixed = evals.filter(e => e.fixed !== null).map(e => [e.iter, e.fixed]);
  if (final && final.val_fixed !== null) fixed.push([final.iter, final.val_fixed]);
  const curves = [['loss of each step', iters, 'var(--train)', 1, 0.5], ['training text', evals.map(e => [e.iter, e.train]), 'var(--train)', 3, 1],
                  ['validation text', fixed, 'var(--val)', 3, 1]];
  const points = curves.flatMap(([, list]) => list).filter(([, loss]) => loss !== null);
  const last = Math.max(1, ...points.map(p => p[0])), losses = [...points.map(p => p[1]), ...record.baselines.map(b => b.loss)];
  const low = Math.min(...losses) - 0.1, high = Math.max(...losses) + 0.1;
  const width = Math.max(330, Math.min(800, $('curves').clientWidth)), height = 380;
  const left = 40, right = 165, bottom = 40, top = 10;
  const x = iter => left + (width - left - right) * iter / last, y = loss => top + (height - top - bottom) * (high - loss) / (high - low);
  const chart = svg('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': 'Losses over the steps of the run'});
  for (let loss = Math.ceil(low * 2) / 2; loss <= high; loss += 0.5) {
    chart.append(svg('line', {x1: left, x2: width - right, y1: y(loss), y2: y(loss), stroke: 'var(--line)'}),
                 svg('text', {x: left - 8, y: y(loss) + 4, 'text-anchor': 'end'}, loss.toFixed(1)));
  }
  for (const part of width < 500 ? [0, 1] : [0, 0.25, 0.5, 0.75, 1])
    chart.append(svg('text', {x: x(part * last), y: height - bottom + 18, 'text-anchor': 'middle'}, number(Math.round(part * last))));
  chart.append(svg('text', {x: x(last / 2), y: height - 4, 'text-anchor': 'middle'}, 'steps (loss in nats per character)'));
  const labels = [];  // [height, text, colour]
  for (const {name, loss} of record.baselines) {
    chart.append(svg('line', {x1: left, x2: width - right, y1: y(loss), y2: y(loss), stroke: 'var(--soft)', 'stroke-dasharray': '2 4'}));
    labels.push([y(loss), `${name} ${loss.toFixed(2)}`, 'var(--soft)']);
  }
  for (const [name, list, stroke, thick, opacity] of curves) {
    const whole = list.filter(([, loss]) => loss !== null);
    chart.append(svg('polyline', {points: whole.map(([iter, loss]) => `${x(iter)},${y(loss)}`).join(' '), fill: 'none', stroke,
                                  'stroke-width': thick, 'stroke-opacity': opacity}));
    if (whole.length && thick > 1) labels.push([y(whole.at(-1)[1]), `${name} ${whole.at(-1)[1].toFixed(2)}`, stroke]);
  }
  labels.sort((a, b) => a[0] - b[0]);
  let above = -Infinity;
  for (const [at, text, fill] of labels) {
    above = Math.max(at, above + 15);
    chart.append(svg('text', {x: width - right + 6, y: above + 4, fill}, text));
  }
  const marker = svg('line', {y1: top, y2: height - bottom, stroke: 'var(--text)'});
  chart.append(marker);
  $('curves').append(chart);

  const written = evals.filter(e => e.sample);
  $('then').hidden = !written.length;
  const slider = $('evaluation');
  slider.max = written.length - 1;
  slider.value = slider.max;
  slider.oninput = () => {
    const e = written[slider.value];
    if (!e) return;
    $('step').textContent = `${number(e.iter)} steps` + (e.val === null ? '' : ` (validation loss ${e.val.toFixed(2)})`);
    slider.setAttribute('aria-valuetext', $('step').textContent);
    $('sample').textContent = e.sample;
    marker.setAttribute('x1', x(e.iter)), marker.setAttribute('x2', x(e.iter));
  };
  slider.oninput();
}

// ---------------------------------------------------------------------------------------------------------------------
// What it is made of

function table(caption, titles, rows) {
  const cell = value => element('td', {className: typeof value === 'number' ? 'number' : ''},
                                typeof value === 'number' ? number(value) : value);
  return element('div', {}, element('table', {}, element('caption', {}, caption),
      element('thead', {}, element('tr', {}, ...titles.map(t => element('th', {scope: 'col'}, t)))),
      element('tbody', {}, ...rows.map(r => element('tr', {}, ...r.map(cell))))));
}

const parametersOf = tensor => tensor.layers * tensor.shape.reduce((a, b) => a * b);

function showMade() {
  const total = record.tensors.reduce((sum, t) => sum + parametersOf(t), 0), {final} = record.run;
  const losses = record.baselines.map(b => [`counting: ${b.name}`, b.loss.toFixed(4)]);
  if (final && final.val_exact !== null) losses.push([`this model, exact, after ${number(final.iter)} steps`, final.val_exact.toFixed(4)]);
  const results = losses.length ? [table('Loss on the validation text', ['of', 'nats per character'], losses)] : [];
  $('made').append(
      table('Tensors', ['name', 'shape', 'parameters'], [
        ...record.tensors.map(t => [t.name, (t.layers > 1 ? [t.layers, ...t.shape] : t.shape).join(' × '), parametersOf(t)]),
        ['together', '', total]]),
      table('Settings of the run', ['flag', 'value'], Object.entries(record.settings).map(([name, value]) => [`--${name}`, value])),
      ...results);
  $('about').textContent = `${number(total)} parameters, ${number(V)} characters, after ${number(record.iteration)} steps of ` +
      'training. It is all in this file and computes here, in your browser; nothing is sent anywhere.';
}

// ---------------------------------------------------------------------------------------------------------------------

matchMedia('(prefers-color-scheme: dark)').onchange = showMaps;
$('text').value = record.text || letter(0);
$('seed').value = record.settings.seed || '1337';
$('text').oninput = textChanged;
$('text').setSelectionRange($('text').value.length * 2 / 3, $('text').value.length * 2 / 3);  // something comes after it
showCurves();
showMade();
ask('load', {shape, weights: $('weights').textContent.trim()}).then(() => {
  textChanged();
  document.documentElement.dataset.ready = 'yes';
});
