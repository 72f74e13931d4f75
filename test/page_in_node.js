// Runs the page's model without a browser, for test_page.cpp: node page_in_node.js page.html. Standard input is
// {"texts": [[token, ...], ...], "prompt": [...], "count": n, "temperature": 1, "top_k": 0, "seed": "1337"}; prints
// {"logits": [[...], ...], "written": [token, ...], "quick": [token, ...], "uniform": [...]}.
'use strict';
const fs = require('fs'), vm = require('vm');
const page = fs.readFileSync(process.argv[2], 'utf8');
const part = id => page.match(new RegExp(`id="${id}">([^]*?)</script>`))[1];

// The worker's own code, with the functions that a browser would give it.
const messages = [], waiting = [];
const context = vm.createContext({performance, setTimeout, atob, postMessage: m => messages.push(m)});
vm.runInContext(part('worker') + ';globalThis.decode = decodeWeights; globalThis.uniform = uniformOf;', context);
const send = (what, request) => context.onmessage({data: {number: messages.length, what, request}});

(async () => {
  const {texts, prompt, count, temperature, top_k: topK, seed} = JSON.parse(fs.readFileSync(0, 'utf8'));
  const {shape} = JSON.parse(part('record'));
  send('load', {shape, weights: part('weights')});
  const logits = texts.map(tokens => {
    send('logits', {tokens});
    return Array.from(messages.at(-1).logits);
  });
  messages.length = 0;
  await send('write', {tokens: prompt, count, temperature, topK, seed, exact: true});
  const written = messages.flatMap(m => Array.from(m.tokens));
  messages.length = 0;
  await send('write', {tokens: prompt, count, temperature, topK, seed, exact: false});
  const quick = messages.flatMap(m => Array.from(m.tokens));
  const uniform = Array.from({length: 20}, (_, i) => context.uniform(BigInt(seed), i));
  process.stdout.write(JSON.stringify({logits, written, quick, uniform}));
})();
