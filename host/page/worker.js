// Computes beside the page, so that the page never waits. It gets the model once, then requests; each answer carries the
// number of its request. Comes after model.js, in the same file.
'use strict';

let model, writer;  // two texts with the same weights: the one that is looked at, and the one that is being written
let writing = 0;    // the number of the request that may go on writing

// Float16 numbers, as base64 of little-endian pairs of bytes, to Float32Array. There are only 65536 different ones.
function decodeWeights(base64) {
  const bytes = atob(base64), floats = new Float32Array(bytes.length / 2), value = new Float32Array(65536);
  for (let half = 0; half < 65536; half++) {
    const sign = half >> 15 ? -1 : 1, exponent = half >> 10 & 31, fraction = half & 1023;
    value[half] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * fraction / 1024);
  }
  for (let i = 0; i < floats.length; i++) floats[i] = value[bytes.charCodeAt(2 * i) | bytes.charCodeAt(2 * i + 1) << 8];
  return floats;
}

// The loss of each token but the first, in nats: -log softmax(logits before it) [token].
function losses(tokens) {
  const V = model.shape.V, out = new Float32Array(tokens.length).fill(NaN);
  for (let t = 1; t < tokens.length; t++) {
    let max = -Infinity, sum = 0;
    const row = (t - 1) * V;
    for (let i = 0; i < V; i++) max = Math.max(max, model.logits[row + i]);
    for (let i = 0; i < V; i++) sum += Math.exp(model.logits[row + i] - max);
    out[t] = Math.log(sum) + max - model.logits[row + tokens[t]];
  }
  return out;
}

// The `count` likeliest tokens, [token, probability] each, and the probability of `truth`, if that is a token.
function likeliest(logits, count, truth) {
  const p = softmax(Float64Array.from(logits)), order = Array.from(p.keys()).sort((i, j) => p[j] - p[i] || i - j);
  return {best: order.slice(0, count).map(i => [i, p[i]]), truth: truth === undefined ? null : p[truth]};
}

const answers = {
  load({shape, weights}) {
    const floats = decodeWeights(weights);
    const cells = shape.L * shape.NH * shape.T * shape.T;  // of all maps of attention, four bytes each
    model = new Model(shape, floats, cells < 2 ** 26), writer = new Model(shape, floats);
    return {};
  },
  // The text's losses, and what the model expects after position `at` at each of its layers.
  look({tokens, at}) {
    const before = performance.now();
    model.forward(tokens);
    const layers = [];
    for (let l = 0; l <= model.shape.L; l++) layers.push(likeliest(model.readout(l, at), 5, tokens[at + 1]));
    return {losses: losses(tokens), next: likeliest(model.logitsAt(at), 10, tokens[at + 1]), layers,
            ms: performance.now() - before};
  },
  // Attention of the text that was looked at last: [layer][head] an array (n, n); null if it is not kept.
  attention() {
    const {T, NH} = model.shape, n = model.tokens.length;
    const heads = model.attention && model.attention.map(layer => Array.from({length: NH}, (_, h) => {
      const out = new Float32Array(n * n);
      for (let t = 0; t < n; t++) out.set(layer.subarray((h * T + t) * T, (h * T + t) * T + t + 1), t * n);
      return out;
    }));
    return {heads, n};
  },
  // All logits of a text: the tests compare them with the trainer's.
  logits({tokens}) {
    writer.forward(tokens);
    return {logits: writer.logits.slice(0, tokens.length * writer.shape.V)};
  },
  stop() {
    writing = 0;
    return {};
  },
};

// Writes on, and sends what there is now and then. The model sees the last T tokens. Once there are more, every token moves
// to another position with each new one, so that nothing kept is of use: `exact` computes all of it anew each time, as
// ./train_gpt sample does; otherwise the older half of the window is let go at once, and then it fills again.
async function write(number, {tokens, count, temperature, topK, seed, exact}) {
  const T = writer.shape.T, text = Array.from(tokens), rest = Math.max(1, T - (T >> 1));
  let begin = Math.max(0, text.length - T), fresh = [], sent = performance.now();
  writing = number;
  for (let i = 0; i < count && writing === number; i++) {
    if (text.length - begin > T) begin = exact ? text.length - T : text.length - rest;
    const window = text.slice(begin);
    writer.forward(window);
    const token = chooseToken(writer.logitsAt(window.length - 1), temperature, topK, uniformOf(BigInt(seed), i));
    text.push(token), fresh.push(token);
    if (performance.now() - sent < 30 && i + 1 < count) continue;
    postMessage({number, tokens: fresh});
    fresh = [], sent = performance.now();
    await new Promise(resolve => setTimeout(resolve));  // a stop may have come
  }
  postMessage({number, tokens: fresh, done: true});
}

onmessage = ({data: {number, what, request}}) => {
  if (what === 'write') return write(number, request);
  postMessage({number, ...answers[what](request)});
};
