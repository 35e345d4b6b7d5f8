// The checks of client_checks.py by openai's node client: node client_checks.mjs ADDRESS KEY MODEL MEDIA, in a folder
// where `npm install openai` was done. MEDIA is a file with a picture, a clip and a sound as the parts of a message.
// Each check has the name that it has there; what was found is printed as one line of JSON.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import OpenAI, { toFile } from 'openai'

const [address, key, model, file] = process.argv.slice(2)
const media = JSON.parse(readFileSync(file, 'utf8'))
const it = new OpenAI({ baseURL: address + '/v1', apiKey: key, maxRetries: 0, timeout: 120_000 })
const root = new OpenAI({ baseURL: address, apiKey: key, maxRetries: 0, timeout: 120_000 })

const ask = (content, more = {}, by = it) => by.chat.completions.create({
  model, messages: [{ role: 'user', content }], temperature: 0, max_tokens: 12, ...more })
const goOn = (prompt, more = {}) => it.completions.create({ model, prompt, temperature: 0, max_tokens: 12, ...more })
const say = async (content, more) => (await ask(content, more)).choices[0].message.content
const write = async (prompt, more) => (await goOn(prompt, more)).choices[0].text
const idsOf = async (text) => (await root.post('/tokenize', { body: { prompt: text } })).tokens
const what = { type: 'text', text: 'what?' }

async function refused(kind, code, param, asked) {
  const error = await asked().then(() => assert.fail(`no ${kind.name}`), (error) => error)
  assert.ok(error instanceof kind, `${error}`)
  assert.deepEqual([error.code, error.param], [code, param])
  assert.ok(error.error.message && error.error.type === error.type)
  return error
}

const CHECKS = {
  'models: list, retrieve, another one': async () => {
    const found = []
    for await (const one of it.models.list()) found.push(one.id)
    assert.deepEqual(found, [model])
    assert.equal((await it.models.retrieve(model)).id, model)
    await refused(OpenAI.NotFoundError, 'model_not_found', 'model', () => it.models.retrieve('other'))
  },
  'chat about a picture (data: URI), a clip, a sound, all three': async () => {
    const positions = async (content) => (await ask(content)).usage.prompt_tokens
    const plain = await positions('what?'), taken = []
    for (const part of media) taken.push(await positions([part, what]) - plain)
    assert.ok(Math.min(...taken) > 0)
    assert.equal(await positions([...media, what]) - plain, taken.reduce((a, b) => a + b))
  },
  'stream = whole, of chats, of two answers, of completions': async () => {
    for (const more of [{}, { temperature: 1, seed: 5, n: 2, max_tokens: 40 }]) {
      const joined = []
      for await (const chunk of await ask('hi', { ...more, stream: true }))
        for (const { index, delta } of chunk.choices) joined[index] = (joined[index] ?? '') + (delta.content ?? '')
      assert.deepEqual(joined, (await ask('hi', more)).choices.map((choice) => choice.message.content))
    }
    let joined = ''
    for await (const chunk of await goOn('the red', { stream: true })) joined += chunk.choices[0].text
    assert.equal(joined, await write('the red'))
  },
  'usage adds up; include_usage: in the last chunk alone': async () => {
    const chunks = []
    for await (const chunk of await ask('hi', { stream: true, stream_options: { include_usage: true } }))
      chunks.push(chunk)
    const last = chunks.pop(), prompt = (await ask('hi')).usage.prompt_tokens
    assert.ok(last.choices.length === 0 && !chunks.some((chunk) => chunk.usage))
    for (const [n, used] of [[1, last.usage], [3, (await ask('hi', { n: 3, min_tokens: 12 })).usage]])
      assert.deepEqual([used.prompt_tokens, used.completion_tokens, used.total_tokens],
        [prompt, n * 12, prompt + n * 12])
  },
  'n, seed: answer i is that of the seed + i': async () => {
    const { choices } = await ask('hi', { n: 3, temperature: 1, seed: 7 }), texts = new Set()
    for (const { index, message } of choices) {
      assert.equal(message.content, await say('hi', { temperature: 1, seed: 7 + index }))
      texts.add(message.content)
    }
    assert.equal(texts.size, 3)
  },
  'stop': async () => {
    const whole = await say('hi'), [stop] = /[ -~]{2}/.exec(whole.slice(1))
    const { message, finish_reason } = (await ask('hi', { stop: [stop, 'never'] })).choices[0]
    assert.deepEqual([message.content, finish_reason], [whole.split(stop)[0], 'stop'])
    assert.equal((await ask('hi')).choices[0].finish_reason, 'length')
  },
  'logit_bias: 100, -100': async () => {
    const [a] = await idsOf('a')
    assert.equal(await say('hi', { logit_bias: { [a]: 100 }, max_tokens: 5 }), 'aaaaa')
    const { choices } = await ask('hi', { logit_bias: { [a]: -100 }, max_tokens: 100, temperature: 2, logprobs: true })
    assert.ok(!choices[0].logprobs.content.some(({ token }) => token === 'a'))
  },
  'frequency_penalty, presence_penalty': async () => {
    const [a] = await idsOf('a'), forced = { logit_bias: { [a]: 1.5 }, max_tokens: 5 }
    assert.equal(await say('hi', forced), 'aaaaa')
    for (const law of ['frequency_penalty', 'presence_penalty']) {
      assert.match(await say('hi', { ...forced, [law]: 2 }), /^a(?!a)/)
      assert.equal(await say('hi', { ...forced, [law]: -2 }), 'aaaaa')
    }
  },
  "logprobs: the greedy token's is the first of top_logprobs, the same float": async () => {
    const { content } = (await ask('hi', { logprobs: true, top_logprobs: 3 })).choices[0].logprobs
    for (const { token, logprob, top_logprobs: [best, second, third, ...more] } of content) {
      assert.deepEqual([token, logprob, more.length], [best.token, best.logprob, 0])
      assert.ok(best.logprob >= second.logprob && second.logprob >= third.logprob)
    }
    const found = (await goOn('the red', { logprobs: 3 })).choices[0].logprobs
    assert.deepEqual(found.token_logprobs, found.top_logprobs.map((top) => Math.max(...Object.values(top))))
    assert.deepEqual([found.tokens.length, found.text_offset.length], [12, 12])
  },
  'response_format: json_object, json_schema': async () => {
    const done = []
    for (let seed = 0; seed < 4; seed++) {
      const more = { seed, temperature: 1, max_tokens: 100, response_format: { type: 'json_object' } }
      const { message, finish_reason } = (await ask('hi', more)).choices[0]
      if (finish_reason === 'stop') done.push(JSON.parse(message.content))
    }
    assert.ok(done.length && done.every((value) => value && typeof value === 'object' && !Array.isArray(value)))
    const schema = { type: 'object', properties: { a: { enum: [1, 2] } }, required: ['a'], additionalProperties: false }
    const response_format = { type: 'json_schema', json_schema: { name: 'x', strict: true, schema } }
    const { a, ...more } = JSON.parse(await say('hi', { max_tokens: 100, response_format }))
    assert.ok([1, 2].includes(a) && Object.keys(more).length === 0)
  },
  'engine in place of model': async () => {
    assert.equal(await say('hi', { model: undefined, engine: model }), await say('hi'))
    await refused(OpenAI.NotFoundError, 'model_not_found', 'model',
      () => ask('hi', { model: undefined, engine: 'other' }))
  },
  'completions: a text, a list, token ids, lists of them': async () => {
    const texts = ['the red', 'what is'], ids = await Promise.all(texts.map(idsOf))
    const alone = [await write(texts[0]), await write(texts[1])]
    assert.equal(await write(ids[0]), alone[0])
    for (const prompt of [texts, ids])
      assert.deepEqual((await goOn(prompt)).choices.map((choice) => choice.text), alone)
  },
  'echo, with logprobs, also alone': async () => {
    const whole = (await goOn('the red', { echo: true, logprobs: 1 })).choices[0]
    const scored = (await goOn('the red', { echo: true, logprobs: 1, max_tokens: 0 })).choices[0]
    const count = (await idsOf('the red')).length, { token_logprobs } = whole.logprobs
    assert.equal(whole.text, 'the red' + await write('the red'))
    assert.deepEqual([token_logprobs[0], token_logprobs.length], [null, count + 12])
    assert.deepEqual([scored.text, scored.logprobs.token_logprobs], ['the red', token_logprobs.slice(0, count)])
    const bare = (await goOn('the red', { echo: true, logprobs: 0, max_tokens: 0 })).choices[0].logprobs
    assert.ok(bare.top_logprobs.slice(1).every((top) => Object.keys(top).length === 1))
  },
  'embeddings: float = base64, length 1': async () => {
    const vectors = async (more) => (await it.embeddings.create({ model, input: ['hi', 'the red'], ...more }))
      .data.map((one) => Array.from(one.embedding))
    const floats = await vectors({ encoding_format: 'float' })
    assert.deepEqual(await vectors({}), floats) // the client asks for base64 by itself
    for (const vector of floats) assert.ok(Math.abs(vector.reduce((sum, v) => sum + v * v, 0) - 1) < 1e-5)
  },
  "transcriptions: a chat's answer about the sound": async () => {
    const wav = await toFile(Buffer.from(media[2].input_audio.data, 'base64'), 'a.wav')
    const heard = await it.audio.transcriptions.create({ model, file: wav })
    const asked = await ask([media[2], { type: 'text', text: 'what is said?' }], { max_tokens: undefined })
    assert.equal(heard.text, asked.choices[0].message.content)
    assert.equal(heard.usage.input_tokens, asked.usage.prompt_tokens)
  },
  'moderations, and a chat that is refused': async () => {
    const { results } = await it.moderations.create({ input: ['a badword', 'a good word'] })
    assert.deepEqual(results.map((result) => result.flagged), [true, false])
    await refused(OpenAI.BadRequestError, 'content_filter', 'messages', () => ask('badword'))
  },
  'tokenize, detokenize, tokenizer_info': async () => {
    const found = await root.post('/tokenize', { body: { prompt: 'the red', return_token_strs: true } })
    assert.deepEqual([found.count, found.token_strs.join('')], [found.tokens.length, 'the red'])
    assert.equal((await root.post('/detokenize', { body: { tokens: found.tokens } })).prompt, 'the red')
    const info = await root.get('/tokenizer_info')
    assert.deepEqual([info.eos_token, info.model_max_length], ['<end>', found.max_model_len])
  },
  'health, metrics': async () => {
    assert.deepEqual(await root.get('/health'), { status: 'ok' })
    const counted = async () => {
      const text = await (await root.get('/metrics').asResponse()).text()
      return Number(/^gpt4v_completion_tokens_total (\S+)/m.exec(text)[1])
    }
    const before = await counted()
    await ask('hi', { min_tokens: 12 })
    assert.equal(await counted(), before + 12)
  },
  'errors 400 (field, context, type, tools, medium), 401, 404': async () => {
    const bad = OpenAI.BadRequestError, none = { url: 'data:image/png;base64,AAAA' }
    const { message } = await refused(bad, 'unknown_parameter', 'temprature', () => ask('hi', { temprature: 1 }))
    assert.match(message, /did you mean 'temperature'/)
    await refused(bad, 'context_length_exceeded', 'messages', () => ask('red '.repeat(3000)))
    await refused(bad, 'invalid_value', 'n', () => ask('hi', { n: '3' }))
    await refused(bad, 'unsupported_parameter', 'tools', () => ask('hi', { tools: [] }))
    await refused(bad, 'invalid_medium', 'messages[0].content[0]', () => ask([{ type: 'image_url', image_url: none }]))
    await refused(OpenAI.AuthenticationError, 'invalid_api_key', null,
      () => ask('hi', {}, it.withOptions({ apiKey: 'other'.repeat(4) })))
    await refused(OpenAI.NotFoundError, 'model_not_found', 'model', () => ask('hi', { model: 'other' }))
  },
  'errors 429: 16 at once, Retry-After': async () => {
    const one = () => ask('hi', { max_tokens: 100 }).then(() => 'answered', (error) => {
      assert.ok(error instanceof OpenAI.RateLimitError && error.code === 'rate_limit_exceeded', `${error}`)
      assert.ok(Number(error.headers.get('retry-after')) > 0)
      return 'later'
    })
    const found = await Promise.all(Array.from({ length: 16 }, one))
    assert.ok(found.includes('later') && found.filter((word) => word === 'answered').length >= 4, `${found}`)
  },
}

const found = {}
for (const [name, check] of Object.entries(CHECKS)) {
  try {
    await check()
    found[name] = 'yes'
  } catch (error) {
    const line = /client_checks\.mjs:(\d+)/.exec(error.stack)?.[1]
    found[name] = `no: ${error.message} in line ${line}`
  }
}
console.log(JSON.stringify(found))
