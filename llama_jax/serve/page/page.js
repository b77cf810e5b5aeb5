'use strict';
// Chat and completion over the same API that everyone uses. Text of the model is only ever put
// into text nodes.

const $ = (id) => document.getElementById(id);
const log = $('log'), input = $('input'), settings = $('settings'), tip = $('tip');
const TOP = 5;

let model = null; // what /v1/models says
let mode = 'completion';
let running = null; // the AbortController of the stream that is open
const messages = []; // of the chat: {role, content}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- what is asked

const control = (name) => settings.elements[name];

function number(name) {
  const text = control(name).value.trim();
  return text === '' ? undefined : Number(text);
}

function controls() {
  const asked = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const name of ['temperature', 'top_p', 'top_k', 'min_p', 'typical_p',
    'repetition_penalty', 'max_tokens', 'seed']) asked[name] = number(name);
  const stop = control('stop').value.split('\n').filter(Boolean)
    .map((line) => line.replace(/\\n/g, '\n').replace(/\\t/g, '\t'));
  if (stop.length) asked.stop = stop;
  return asked;
}

function chatBody() {
  const system = control('system').value.trim();
  const body = { ...controls(), messages: [...messages] };
  if (system) body.messages.unshift({ role: 'system', content: system });
  if (control('logprobs').checked) Object.assign(body, { logprobs: true, top_logprobs: TOP });
  return body;
}

function completionBody(prompt) {
  const body = { ...controls(), prompt };
  if (control('logprobs').checked) body.logprobs = TOP;
  return body;
}

function headers() {
  const sent = { 'content-type': 'application/json' };
  if ($('key').value) sent.authorization = `Bearer ${$('key').value}`;
  return sent;
}

class Refused extends Error {
  constructor(error, status) {
    super(error?.message || `the server answered ${status}`);
    this.param = error?.param;
    this.status = status;
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return new Refused(body?.error, response.status);
}

// Yields the JSON of each event.
async function* events(path, body, signal) {
  const response = await fetch(path, {
    method: 'POST', headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error('the connection broke off');
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith('data: ')) continue;
      if (part === 'data: [DONE]') return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Refused(event.error, 500);
      yield event;
    }
  }
}

// ---- what is shown

function nearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

function card(kind) {
  const article = element('article', kind);
  article.append(element('div', 'text'));
  const facts = element('div', 'facts');
  facts.append(element('span'));
  article.append(facts);
  return article;
}

// Streams one answer into a card; gives its text, and whether it was done as asked or stopped.
async function write(article, path, body) {
  const place = article.querySelector('.text'), facts = article.querySelector('.facts span');
  let text = '', count = 0, early = 0, surprise = 0; // early: tokens of the first piece
  let reason = null, usage = null, first = null, done = true;
  const begin = performance.now();
  running = new AbortController();
  busy(true);
  article.classList.add('writing');

  function tell() {
    const now = performance.now(), told = [];
    const tokens = usage ? usage.completion_tokens : count;
    if (tokens) told.push(`${tokens} tokens`);
    if (first !== null && now > first && tokens > (early || 1)) {
      told.push(`${((tokens - (early || 1)) / (now - first) * 1000).toFixed(1)} tokens/s`);
    }
    if (first !== null) told.push(`first after ${((first - begin) / 1000).toFixed(2)} s`);
    if (count) told.push(`${(surprise / count).toFixed(2)} nats a token`);
    if (reason && reason !== 'stop') told.push({ length: 'most tokens reached' }[reason] || reason);
    facts.textContent = told.join(' · ');
  }

  try {
    for await (const event of events(path, body, running.signal)) {
      if (event.usage) usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const piece = choice.text ?? choice.delta.content ?? '';
      const tokens = tokensOf(choice);
      if (first === null && (piece || tokens)) {
        first = performance.now();
        early = tokens?.length || 0;
      }
      const follow = nearEnd();
      if (tokens) {
        count += tokens.length;
        for (const one of tokens) surprise -= one.logprob;
        place.append(...spans(piece, tokens));
      } else if (piece) {
        place.append(piece);
      }
      text += piece;
      reason = choice.finish_reason || reason;
      if (!usage) tell();
      if (follow) toEnd();
    }
    tell();
  } catch (error) {
    if (error.name === 'AbortError') {
      reason = 'stopped';
      tell();
    } else {
      done = false;
      failed(article, error);
    }
  } finally {
    article.classList.remove('writing');
    running = null;
    busy(false);
  }
  return { text, done };
}

function failed(article, error) {
  const facts = article.querySelector('.facts span');
  facts.textContent = error.message;
  facts.className = 'wrong';
  const wrong = error.param && control(error.param);
  if (wrong) {
    wrong.setAttribute('aria-invalid', 'true');
    $('controls').open = true;
  }
  toEnd();
  if (error.status === 401) askForKey();
}

function action(article, name, act) {
  const button = element('button', 'plain', name);
  button.type = 'button';
  button.addEventListener('click', () => running || act());
  article.querySelector('.facts').append(button);
}

function withCopy(article, text) {
  action(article, 'Copy', () => navigator.clipboard?.writeText(text()));
}

async function say(content) {
  const mine = element('article', 'user');
  mine.append(element('div', 'text', content));
  log.append(mine);
  messages.push({ role: 'user', content });
  await answer();
}

async function answer() {
  const article = card('assistant');
  log.append(article);
  toEnd();
  const { text: content, done } = await write(article, 'v1/chat/completions', chatBody());
  if (!done) {
    const { content: unanswered } = messages.pop();
    input.value ||= unanswered; // to be sent again
    return;
  }
  const place = messages.push({ role: 'assistant', content }) - 1;
  withCopy(article, () => content);
  action(article, 'Again', () => {
    messages.length = place;
    while (article.nextSibling) article.nextSibling.remove();
    article.remove();
    answer();
  });
  toEnd();
}

async function complete(prompt) {
  const article = card('completion');
  article.querySelector('.text').append(element('b', '', prompt));
  log.append(article);
  toEnd();
  const { text: first, done } = await write(article, 'v1/completions', completionBody(prompt));
  if (!done) return;
  let text = prompt + first;
  withCopy(article, () => text);
  action(article, 'Again', () => complete(prompt));
  action(article, 'Go on', async () => {
    text += (await write(article, 'v1/completions', completionBody(text))).text;
  });
  toEnd();
}

// ---- the whole

function busy(is) {
  $('send').disabled = is || !model;
  $('stop').hidden = !is;
  $('clear').disabled = is;
  for (const name of ['chat', 'completion']) $(name).disabled = is || (name === 'chat' && !model?.chat);
}

function setMode(to) {
  mode = to;
  for (const name of ['chat', 'completion']) $(name).setAttribute('aria-pressed', name === to);
  document.body.classList.toggle('completing', to === 'completion');
  for (const only of document.querySelectorAll('.chat-only')) only.hidden = to !== 'chat';
  $('send').textContent = to === 'chat' ? 'Send' : 'Complete';
  input.placeholder = to === 'chat' ? 'A message. Enter sends, Shift+Enter begins a line.'
    : 'Text to continue. Ctrl+Enter completes.';
  log.dataset.empty = to === 'chat' ? 'No messages yet.' : 'Nothing completed yet.';
  clear();
  save();
}

function clear() {
  messages.length = 0;
  log.replaceChildren();
  tip.hidden = true;
}

function send(event) {
  event?.preventDefault();
  const text = input.value;
  if (running || !model || (mode === 'chat' && !text)) return;
  for (const wrong of settings.querySelectorAll('[aria-invalid]')) wrong.removeAttribute('aria-invalid');
  if (mode === 'chat') {
    input.value = '';
    say(text);
  } else {
    complete(text);
  }
}

function save() {
  const kept = { mode };
  for (const field of settings.elements) {
    if (field.name) kept[field.name] = field.type === 'checkbox' ? field.checked : field.value;
  }
  try { localStorage.setItem('llama_jax', JSON.stringify(kept)); } catch { /* not allowed here */ }
}

function restore() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem('llama_jax')) || {}; } catch { /* none */ }
  for (const field of settings.elements) {
    if (!(field.name in kept)) continue;
    if (field.type === 'checkbox') field.checked = kept[field.name] === true;
    else field.value = kept[field.name];
  }
  log.classList.toggle('shaded', control('logprobs').checked);
  return kept.mode;
}

function askForKey() {
  $('key-label').hidden = false;
  $('controls').open = true;
  $('key').focus();
}

async function connect() {
  try {
    const response = await fetch('v1/models', { headers: headers() });
    if (!response.ok) throw await refusal(response);
    model = (await response.json()).data[0];
  } catch (error) {
    $('about').textContent = error.status === 401 ? 'This server asks for an API key.' : error.message;
    $('about').classList.add('wrong');
    if (error.status === 401) askForKey();
    return;
  }
  $('about').classList.remove('wrong');
  $('model').textContent = document.title = model.id;
  $('about').textContent = `${model.length.toLocaleString('en')} tokens of context, `
    + `vocabulary of ${model.vocabulary.toLocaleString('en')}`;
  $('chat').title = model.chat ? '' : 'This model has no chat format';
  control('max_tokens').max = model.length;
  busy(false);
  const wanted = restore();
  setMode(model.chat && wanted !== 'completion' ? 'chat' : 'completion');
  input.focus();
}

$('composer').addEventListener('submit', send);
$('stop').addEventListener('click', () => running?.abort());
$('clear').addEventListener('click', clear);
$('chat').addEventListener('click', () => setMode('chat'));
$('completion').addEventListener('click', () => setMode('completion'));
$('key').addEventListener('change', connect);
settings.addEventListener('submit', (event) => event.preventDefault());
settings.addEventListener('input', () => {
  log.classList.toggle('shaded', control('logprobs').checked);
  save();
});
log.addEventListener('pointerover', overToken);
log.addEventListener('click', overToken);
log.addEventListener('pointerleave', () => { tip.hidden = true; });
log.addEventListener('scroll', () => { tip.hidden = true; });
addEventListener('keydown', (event) => {
  if (event.key === 'Escape') running?.abort();
});
input.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.isComposing) return;
  if (mode === 'chat' ? !event.shiftKey : event.ctrlKey || event.metaKey) send(event);
});
if (innerWidth <= 800) $('controls').open = false;
busy(false);
restore();
connect();
