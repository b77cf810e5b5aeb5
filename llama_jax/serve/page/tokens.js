'use strict';
// Tokens and how likely they were: from the JSON of a piece to shaded spans, and the list of
// alternatives that shows over one.

const MOST_SURPRISE = Math.log(400); // of the darkest shade

// Tokens of one piece: [{text, logprob, top: [[text, logprob]]}], or null where nothing is told.
function tokensOf(choice) {
  const told = choice.logprobs;
  if (!told) return null;
  if (told.content) {
    return told.content.map((one) => ({
      text: one.token, bytes: one.bytes, logprob: one.logprob,
      top: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return told.tokens.map((text, i) => ({
    text, logprob: told.token_logprobs[i],
    top: Object.entries(told.top_logprobs?.[i] || {}),
  }));
}

// A span for each token; one for all where tokens are parts of characters, or were cut.
function spans(text, tokens) {
  const joined = tokens.map((one) => one.text).join('');
  const groups = joined === text ? tokens.map((one) => [one.text, [one]]) : [[text, tokens]];
  return groups.filter(([shown]) => shown).map(([shown, group]) => {
    const span = element('span', 'token', shown);
    const surprise = Math.max(0, ...group.map((one) => -one.logprob)) / MOST_SURPRISE;
    span.style.setProperty('--surprise', Math.min(1, surprise).toFixed(3));
    span.tokens = group;
    return span;
  });
}

function showTip(span) {
  tip.replaceChildren();
  for (const one of span.tokens) {
    const rows = [...one.top];
    if (!rows.some(([text]) => text === one.text)) rows.push([one.text, one.logprob]);
    rows.sort((a, b) => b[1] - a[1]);
    for (const [text, logprob] of rows) {
      const row = element('div', text === one.text ? 'drawn' : '');
      const bar = element('i');
      bar.style.setProperty('--share', Math.exp(logprob).toFixed(4));
      const percent = Math.exp(logprob) * 100;
      const share = percent >= 0.01 ? `${percent.toFixed(percent < 1 ? 2 : 1)}%` : '<0.01%';
      row.append(element('code', '', JSON.stringify(text).slice(1, -1).replace(/ /g, '␣')), bar,
        element('em', '', share));
      tip.append(row);
    }
  }
  tip.hidden = false;
  const at = span.getClientRects()[0], size = tip.getBoundingClientRect();
  const below = at.bottom + 6 + size.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
}

function overToken(event) {
  const span = event.target.closest?.('.token');
  if (span && log.classList.contains('shaded')) showTip(span);
  else tip.hidden = true;
}
