// Asks a server by Vercel's AI SDK: node ask.mjs URL MODEL; prints what came back, as JSON.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateObject, generateText, streamText } from 'ai';
import { z } from 'zod';

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: 'here',
  baseURL: url,
  apiKey: 'any',
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const model = provider(name);
const prompt = 'What is the capital of France?';
const settings = { model, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

const whole = await generateText({ ...settings, prompt, providerOptions: { here: { user: 'me' } } });
const stream = streamText({ ...settings, prompt });
const pieces = [];
for await (const piece of stream.textStream) pieces.push(piece);
const made = await generateObject({
  ...settings,
  prompt,
  schema: z.object({ capital: z.enum(['Paris', 'Rome']), large: z.boolean() }),
});
const completed = await generateText({
  ...settings,
  model: provider.completionModel(name),
  prompt: 'The capital of France is',
  stopSequences: ['.'],
});
const { embeddings } = await embedMany({
  model: provider.textEmbeddingModel(name),
  values: ['Paris', 'Rome'],
});

console.log(
  JSON.stringify({
    text: whole.text,
    reason: whole.finishReason,
    usage: whole.usage,
    streamed: pieces,
    streamedUsage: await stream.usage,
    object: made.object,
    completed: completed.text,
    embedded: embeddings.map((vector) => vector.length),
  }),
);
