// The whole model, from characters to the next one: the shortest telling of it in this project. It is forward of
// train_gpt_cpu.cpp, without dropout and for one text at a time. The names are those of the trainers: T positions, C
// channels, L layers, NH heads of HS channels, V characters.
'use strict';

class Model {
  // shape: {V, T, C, L, NH}. weights: a Float32Array of the parameters in the order below, layer by layer where each
  // layer has its own. keepsAttention: for maps of who looks at whom.
  constructor(shape, weights, keepsAttention = false) {
    const {V, T, C, L} = this.shape = shape;
    this.keepsAttention = keepsAttention;
    let at = 0;
    const next = size => weights.subarray(at, at += size);
    const layers = size => Array.from({length: L}, () => next(size));
    this.wte = next(V * C), this.wpe = next(T * C);                    // token and position embedding
    this.ln1w = layers(C), this.ln1b = layers(C);                      // LayerNorm before attention
    this.qkvw = layers(3 * C * C);                                     // rows of all queries, then keys, then values
    this.attprojw = layers(C * C), this.attprojb = layers(C);
    this.ln2w = layers(C), this.ln2b = layers(C);                      // LayerNorm before the feed-forward layers
    this.fcw = layers(4 * C * C), this.fcb = layers(4 * C);            // C -> 4C
    this.fcprojw = layers(4 * C * C), this.fcprojb = layers(C);        // 4C -> C
    this.lnfw = next(C), this.lnfb = next(C);                          // the last LayerNorm
    this.headw = next(V * C), this.headb = next(V);                    // C -> V
    this.restart();
  }

  restart() {
    const {V, T, C, L, NH} = this.shape, floats = size => new Float32Array(size);
    this.tokens = [];                                                  // those whose results are below
    this.stream = Array.from({length: L + 1}, () => floats(T * C));    // the residual stream below each layer, and its end
    this.qkv = Array.from({length: L}, () => floats(T * 3 * C));       // a row: queries, keys, values
    // (NH, T, T): row t looks at column u. null: that would be too much to keep.
    this.attention = this.keepsAttention ? Array.from({length: L}, () => floats(NH * T * T)) : null;
    this.weights = floats(T);
    this.logits = floats(T * V);
    this.norm = floats(T * C), this.att = floats(T * C), this.branch = floats(T * C), this.fc = floats(T * 4 * C);
  }

  // Makes logits (n, V) of n <= T tokens. What stands before the first token that differs from those of the call before
  // is still there, keys and values included: a token sees only what is to its left.
  forward(tokens) {
    const {C, L, V} = this.shape, n = tokens.length;
    let from = 0;
    while (from < n && from < this.tokens.length && tokens[from] === this.tokens[from]) from++;
    this.tokens = Array.from(tokens);
    if (from === n) return;
    for (let t = from; t < n; t++)
      for (let c = 0; c < C; c++) this.stream[0][t * C + c] = this.wte[tokens[t] * C + c] + this.wpe[t * C + c];
    for (let l = 0; l < L; l++) {
      const stream = this.stream[l + 1];
      stream.set(this.stream[l].subarray(from * C, n * C), from * C);
      layernorm(this.norm, stream, this.ln1w[l], this.ln1b[l], from, n, C);
      linear(this.qkv[l], this.norm, this.qkvw[l], null, from, n, C, 3 * C);
      this.attend(l, from, n);
      linear(this.branch, this.att, this.attprojw[l], this.attprojb[l], from, n, C, C);
      for (let i = from * C; i < n * C; i++) stream[i] += this.branch[i];

      layernorm(this.norm, stream, this.ln2w[l], this.ln2b[l], from, n, C);
      linear(this.fc, this.norm, this.fcw[l], this.fcb[l], from, n, C, 4 * C);
      for (let i = from * 4 * C; i < n * 4 * C; i++) this.fc[i] = Math.max(0, this.fc[i]);  // ReLU
      linear(this.branch, this.fc, this.fcprojw[l], this.fcprojb[l], from, n, 4 * C, C);
      for (let i = from * C; i < n * C; i++) stream[i] += this.branch[i];
    }
    layernorm(this.norm, this.stream[L], this.lnfw, this.lnfb, from, n, C);
    linear(this.logits, this.norm, this.headw, this.headb, from, n, C, V);
  }

  // att = softmax(q k^T / sqrt(HS)) v, head by head. Position t looks at positions 0 ... t.
  attend(l, from, n) {
    const {T, C, NH} = this.shape, HS = C / NH, qkv = this.qkv[l], scale = 1 / Math.sqrt(HS);
    for (let h = 0; h < NH; h++)
      for (let t = from; t < n; t++) {
        const q = t * 3 * C + h * HS, row = (h * T + t) * T;
        const weights = this.attention ? this.attention[l].subarray(row, row + t + 1) : this.weights.subarray(0, t + 1);
        for (let u = 0; u <= t; u++) {
          const k = u * 3 * C + C + h * HS;
          let sum = 0;
          for (let c = 0; c < HS; c++) sum += qkv[q + c] * qkv[k + c];
          weights[u] = sum * scale;
        }
        softmax(weights);
        const out = this.att.subarray(t * C + h * HS, t * C + (h + 1) * HS).fill(0);
        for (let u = 0; u <= t; u++) {
          const v = u * 3 * C + 2 * C + h * HS, weight = weights[u];
          for (let c = 0; c < HS; c++) out[c] += weight * qkv[v + c];
        }
      }
  }

  // The logits that the last LayerNorm and the head make of the stream below layer l at position t: what the model would
  // say there if it ended. l = L is its end.
  readout(l, t) {
    const {C, V} = this.shape, norm = new Float32Array(C), logits = new Float32Array(V);
    layernorm(norm, this.stream[l].slice(t * C, (t + 1) * C), this.lnfw, this.lnfb, 0, 1, C);
    linear(logits, norm, this.headw, this.headb, 0, 1, C, V);
    return logits;
  }
  logitsAt(t) { return this.logits.slice(t * this.shape.V, (t + 1) * this.shape.V); }
}

// Rows from ... n - 1 of out (n, C) = (inp - mean) / sqrt(variance + 1e-5) * weight + bias
function layernorm(out, inp, weight, bias, from, n, C) {
  for (let i = from * C; i < n * C; i += C) {
    let mean = 0, variance = 0;
    for (let c = 0; c < C; c++) mean += inp[i + c] / C;
    for (let c = 0; c < C; c++) variance += (inp[i + c] - mean) ** 2 / C;
    const rstd = 1 / Math.sqrt(variance + 1e-5);
    for (let c = 0; c < C; c++) out[i + c] = (inp[i + c] - mean) * rstd * weight[c] + bias[c];
  }
}

// Rows from ... n - 1 of out (n, OC) = inp (n, C) @ weight (OC, C)^T + bias. Two rows and four outputs at a time: six numbers
// are read for eight products. Where a row or an output is missing at the end, the last one is computed twice.
function linear(out, inp, weight, bias, from, n, C, OC) {
  for (let o = 0; o < OC; o += 4) {
    const o1 = Math.min(o + 1, OC - 1), o2 = Math.min(o + 2, OC - 1), o3 = Math.min(o + 3, OC - 1);
    const w0 = o * C, w1 = o1 * C, w2 = o2 * C, w3 = o3 * C;
    const b0 = bias ? bias[o] : 0, b1 = bias ? bias[o1] : 0, b2 = bias ? bias[o2] : 0, b3 = bias ? bias[o3] : 0;
    for (let t = from; t < n; t += 2) {
      const next = Math.min(t + 1, n - 1), i = t * C, j = next * C;
      let s0 = b0, s1 = b1, s2 = b2, s3 = b3, r0 = b0, r1 = b1, r2 = b2, r3 = b3;
      for (let c = 0; c < C; c++) {
        const x = inp[i + c], y = inp[j + c];
        const a = weight[w0 + c], b = weight[w1 + c], d = weight[w2 + c], e = weight[w3 + c];
        s0 += x * a, s1 += x * b, s2 += x * d, s3 += x * e;
        r0 += y * a, r1 += y * b, r2 += y * d, r3 += y * e;
      }
      const s = t * OC, r = next * OC;
      out[s + o] = s0, out[s + o1] = s1, out[s + o2] = s2, out[s + o3] = s3;
      out[r + o] = r0, out[r + o1] = r1, out[r + o2] = r2, out[r + o3] = r3;
    }
  }
}

// x = exp(x) / sum of exp(x); less the greatest first, so that no exponential is infinite. Returns x.
function softmax(x) {
  let max = -Infinity, sum = 0;
  for (let i = 0; i < x.length; i++) max = Math.max(max, x[i]);
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - max);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
  return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing the next character, by the rule and the random numbers of `./train_gpt sample` (host/sampler.h, random.h).

// logits (V) / temperature, of the topK likeliest (0: all); temperature 0 takes the likeliest. uniform: in (0, 1).
function chooseToken(logits, temperature, topK, uniform) {
  let order = Array.from(logits.keys());
  const likelier = (i, j) => logits[j] - logits[i] || i - j;
  const best = order.reduce((i, j) => likelier(i, j) <= 0 ? i : j);
  if (temperature === 0) return best;
  if (topK > 0 && topK < logits.length) order = order.sort(likelier).slice(0, topK).sort((i, j) => i - j);
  let sum = 0;
  const cumulated = order.map(i => sum += Math.exp((logits[i] - logits[best]) / temperature));
  const at = cumulated.findIndex(x => x > uniform * sum);
  return order[at < 0 ? order.length - 1 : at];
}

// The random number of the i-th new character of a text. seed: a BigInt of 64 bits. Philox4x32-10, whose first word is all
// that is needed: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
function uniformOf(seed, i) {
  const samplerSite = 8 << 24;
  const high = (a, b) => Number(BigInt(a >>> 0) * BigInt(b >>> 0) >> 32n), low = (a, b) => Math.imul(a, b) >>> 0;
  let [c0, c1, c2, c3] = [0, 0, i, samplerSite];
  let key0 = Number(seed & 0xffffffffn), key1 = Number(seed >> 32n);
  for (let round = 0; round < 10; round++) {
    [c0, c1, c2, c3] = [(high(0xCD9E8D57, c2) ^ c1 ^ key0) >>> 0, low(0xCD9E8D57, c2),
                        (high(0xD2511F53, c0) ^ c3 ^ key1) >>> 0, low(0xD2511F53, c0)];
    key0 = (key0 + 0x9E3779B9) >>> 0, key1 = (key1 + 0xBB67AE85) >>> 0;
  }
  return (c0 + 0.5) / 2 ** 32;
}
