"""What a command line says arrives where it has its effect, for every option of the scripts that
read no configuration: what they call is asked what it was given."""

import dataclasses
import json
import sys
import types

import pytest

from experiments import cli, evaluate, generate, models, serve, tasks
from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.evaluate.suite import Evaluation, Suite
from llama_jax.generate.quantized import Quantization
from llama_jax.generate.speculative.draft import Lookup
from llama_jax.model.config import Compute, ModelConfig
from tests.convert import written
from tests.parity.cases import weights

CONFIG = ModelConfig(
    vocab=512, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=96
)
TEMPLATE = '<|im_start|>{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}'
MESH = {'mesh.data': 4, 'mesh.fsdp': 1, 'mesh.tensor': 2}
COMPUTE = {
    'compute.precision': 'bfloat16',
    'compute.attention': 'reference',
    'compute.remat': 'full',
    'compute.unroll': 1,
}
OTHER = Compute('bfloat16', 'reference', 'full', 1)
HOW = {'quantization.weights': 'int4', 'quantization.cache': 'int8', 'quantization.group': 8}
LESS = Quantization('int4', 'int8', 8)


def command(options):
    """The arguments that give these options."""
    found = []
    for name, value in options.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        found += [f'--{name}', *map(str, values)]
    return found


def all_but(kind, options, others):
    """Every option is among `options`, or is one of `others`, which tests of their own give."""
    given = {name.replace('-', '_') for name in (*options, *others)}
    assert given == {name for name in cli._names(kind) if not name.startswith('no-')}


@pytest.fixture(scope='module')
def gguf(tmp_path_factory):
    return written.write(
        tmp_path_factory.mktemp('weights') / 'tiny.gguf',
        written.tensors_of(weights(CONFIG, seed=3), CONFIG),
        written.architecture(CONFIG) | written.vocabulary(),
    )


@pytest.fixture
def template(tmp_path):
    path = tmp_path / 'own.jinja'
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def generating(monkeypatch, run_script):
    """Runs experiments.generate with a generator that keeps what it is asked."""
    asked = {}

    class Asked:
        def __init__(self, config, params, **settings):
            asked.update(settings, config=config)

        def stream(self, prompt, **settings):
            asked.update(settings, prompt=prompt)
            return iter([[70]])

    def generating(*arguments):
        monkeypatch.setattr(generate, 'Generator', Asked)
        code, _, error = run_script(generate.main, *arguments)
        assert code == 0, error
        return asked

    return generating


def text(model, ids):
    return model.vocabulary.decode(ids, show_control=True)


def test_generate(generating, gguf, template):
    draws = {'max_tokens': 11, 'temperature': 0.5, 'top_k': 7, 'top_p': 0.25, 'seed': 9}
    options = {'weights': gguf, 'chat': 'Hi', 'system': 'Be terse', 'chat-template': template}
    options |= draws | MESH | COMPUTE | HOW
    others = ('checkpoint', 'prompt', 'messages', 'source', 'lookup', 'draft', 'mesh.slice')
    unmasking = ('order', 'steps', 'block')  # test_unmasking_of_runs.py
    all_but(generate.Options, options, (*others, *unmasking))
    asked = generating(*command(options))
    assert {name: asked[name] for name in draws} == draws
    assert asked['compute'] == OTHER and asked['quantization'] == LESS
    assert tuple(asked['mesh'].shape.values()) == (1, 4, 1, 2)
    assert asked['config'] == CONFIG and asked['source'] is None
    model = models.from_weights(str(gguf), asked['mesh'])
    assert text(model, asked['prompt']) == '<|im_start|>[system:Be terse][user:Hi]'
    assert (asked['eos_ids'], asked['pad_id']) == (model.chatting(str(template)).end_ids, 2)


def test_generate_from_a_file_of_messages(generating, gguf, template, tmp_path):
    said = (('user', 'a'), ('assistant', 'b'), ('user', 'c'))
    chat = [{'role': role, 'content': content} for role, content in said]
    (tmp_path / 'chat.json').write_text(json.dumps(chat))
    options = ('--weights', gguf, '--messages', 'chat.json', '--chat-template', template)
    asked = generating(*options)
    model = models.from_weights(str(gguf), asked['mesh'])
    assert text(model, asked['prompt']) == '<|im_start|>[user:a][assistant:b][user:c]'
    usual = {'max_tokens': 128, 'temperature': 0.8, 'top_k': 0, 'top_p': 0.95, 'seed': 0}
    assert {name: asked[name] for name in usual} == usual
    assert asked['compute'] == Compute() and asked['quantization'] == Quantization()


def test_serve(monkeypatch, run_script, gguf, template):
    from llama_jax.serve import app, run, warm

    asked = {}

    class Engine:
        source_length = 0

        def __init__(self, programs, **settings):
            asked.update(engine=settings, programs=programs)

        def close(self):
            asked['closed'] = True

    class Server:
        connections = types.SimpleNamespace(most=9, of_one=3)

        def __init__(self, made):
            asked['made'] = made

        def run(self, sockets):
            asked['address'] = sockets[0].getsockname()

    bind = run.bind
    monkeypatch.setattr(run, 'bind', lambda host, port: asked.update(port=port) or bind(host, 0))
    monkeypatch.setattr(serve, 'Engine', Engine)
    monkeypatch.setattr(run, 'Server', Server)
    monkeypatch.setattr(warm, 'warm', lambda engine, **how: asked.update(warm=how))
    monkeypatch.setattr(
        app, 'build', lambda served, **how: asked.update(how, served=served) or 'app'
    )
    monkeypatch.setattr(
        models.Pretrained, 'programs', lambda model, *how: asked.update(how=how) or 'programs'
    )
    monkeypatch.setenv(serve.KEYS, ' first, ,second ')
    options = {'weights': gguf, 'name': 'mine', 'chat-template': template, 'port': 4321}
    options |= {
        'host': '127.0.0.2',
        'rows': 3,
        'length': 50,
        'queue': 5,
        'timeout': 7.5,
        'steps': 3,
    }
    options |= (
        {'cors': ('https://a.org', 'https://b.org'), 'lookup': 4, 'steps': 3} | MESH | COMPUTE | HOW
    )
    all_but(serve.Options, options, ('checkpoint', 'draft', 'mesh.slice'))
    code, _, error = run_script(serve.main, *command(options))
    assert code == 0, error
    host, port = asked['address']
    assert host == '127.0.0.2' and asked['port'] == 4321
    assert error[-1].startswith(f'serving mine at http://{host}:{port}, ')
    mesh, *how = asked['how']
    assert tuple(mesh.shape.values()) == (1, 4, 1, 2) and how == [OTHER, LESS]
    engine = {'rows': 3, 'length': 50, 'queue': 5, 'speculate': Lookup(n_draft=4), 'steps': 3}
    assert engine.items() <= asked['engine'].items() and asked['programs'] == 'programs'
    assert asked['engine']['warm'], 'all is compiled before it says that it serves'
    assert asked['engine']['prefill_chunk'] == asked['warm']['piece'] == serve.PIECE
    served = asked['served']
    assert served.name == 'mine' and served.chat.source == TEMPLATE
    assert asked['limits'].seconds == 7.5 and asked['limits'].choices <= 5
    assert asked['keys'] == ['first', 'second'] and asked['made'] == 'app' and asked['closed']
    assert tuple(asked['origins']) == options['cors']


@pytest.mark.parametrize(
    ('script', 'more'), [(generate, ('--prompt', 'a')), (serve, ('--port', 0))]
)
def test_a_run_is_named(monkeypatch, run_script, script, more):
    def load(checkpoint, weights, mesh, *, heads, any_order=False):
        raise UserError(f'asked for {checkpoint} or {weights}' + heads * ', with heads')

    monkeypatch.setattr(models, 'load', load)
    for draft, told in (((), ''), (('--draft', 'heads'), ', with heads')):
        code, _, error = run_script(script.main, '--checkpoint', 'runs/x@3', *more, *draft)
        assert (code, error) == (2, [f'error: asked for runs/x@3 or None{told}'])


@pytest.fixture
def evaluating(monkeypatch, run_script, tmp_path):
    """Runs experiments.evaluate with a model and measures that keep what they are asked."""
    asked = {}
    (tmp_path / 'run').mkdir()
    data = DataConfig(validation=(Source('python_corpus/stdlib_code', label='own'),))
    trained = types.SimpleNamespace(
        step=3,
        experiment=types.SimpleNamespace(data=data),
        tokenizer=types.SimpleNamespace(bos_id=1),
    )

    def measured(what, *names, found):
        def measured(*given):
            asked.update(zip(names, given, strict=True), what=what)
            return found

        return measured

    monkeypatch.setattr(evaluate, 'load', lambda run, mesh, **_: asked.update(run=run) or trained)
    monkeypatch.setattr(evaluate, 'tell', lambda result, path: asked.update(path=path))
    names = ('trained', 'experiment', 'suite', 'mesh')
    monkeypatch.setattr(evaluate, 'evaluate_trained', measured('suite', *names, found={}))
    names = ('trained', 'experiment', 'data', 'suite', 'mesh')
    of_sets = {'a': Evaluation({'text': {'documents': 1}}, {})}
    monkeypatch.setattr(evaluate, 'evaluate_own', measured('own', *names, found=of_sets))

    def evaluating(*arguments):
        asked.clear()
        code, _, error = run_script(evaluate.main, *arguments)
        assert code == 0, error
        return asked

    return evaluating


OF_SUITE = Suite('a', 'b', 'c', 'd', ('e', 'f'), *range(2, 13), (0.5, 0.25), 4, ('needle',), 5, 3)


def test_evaluate(evaluating, run_script, monkeypatch):
    suite = {f'suite.{name}': value for name, value in dataclasses.asdict(OF_SUITE).items()}
    asked = evaluating('run', *command(suite | MESH))
    assert asked['what'] == 'suite' and asked['run'] == 'run' and asked['suite'] == OF_SUITE
    assert tuple(asked['mesh'].shape.values()) == (1, 4, 1, 2)
    assert str(asked['path']) == 'run/evaluation.json'
    asked = evaluating('run', '--own', *command(suite | MESH))
    assert asked['what'] == 'own' and asked['suite'] == OF_SUITE
    assert asked['data'].validation == (Source('python_corpus/stdlib_code', label='own'),)
    trained = asked['trained']
    assert evaluating('run', '--own', '--output', 'x.json')['path'].name == 'x.json'
    asked = evaluating('run', '--text', 'zh=a.txt', 'b.txt')
    assert [source.files for source in asked['data'].validation] == [('a.txt',), ('b.txt',)]
    for run in ('run', 'run@3'):
        assert evaluating(run, '--output', 'x.json')['path'].name == 'x.json'
    sets = tuple(Source('text_files', files=(name,)) for name in ('a.txt', 'b.txt'))
    trained.experiment.data = DataConfig(validation=sets)
    code, _, error = run_script(evaluate.main, 'run', '--own', '--output', 'x.json')
    assert code == 2 and '--output is one file, and run has several sets' in error[-1]
    monkeypatch.setattr(evaluate, 'read_run', lambda workdir: {})
    asked = evaluating('--from', 'theirs', '--output', 'x.json', *command(suite | MESH))
    assert asked['what'] == 'suite' and asked['run'] == 'theirs' and asked['suite'] == OF_SUITE
    assert asked['path'].name == 'x.json'
    assert tuple(asked['mesh'].shape.values()) == (1, 4, 1, 2)
    monkeypatch.setattr(evaluate, 'open_sources', lambda *_: types.SimpleNamespace(sources=['']))
    monkeypatch.setattr(evaluate.whole, 'likelihood_of_text', lambda *_, **__: {})
    asked = evaluating(
        *('--from', 'theirs', '--text', 'a.txt', '--output', 'x.json'), *command(suite | MESH)
    )
    assert asked['what'] == 'own' and asked['suite'] == OF_SUITE and asked['path'].name == 'x.json'
    assert [source.files for source in asked['data'].validation] == [('a.txt',)]
    others = ('run', 'from', 'output', 'text', 'own', 'mesh.slice', *OF_TASKS, *COMPUTE)
    all_but(evaluate.Options, suite | MESH, (*others, 'tasks', 'lm_eval'))


OF_TASKS = {'against': 'b', 'shots': 2, 'shot_seeds': 3, 'limit': 4, 'truncate': True, 'seed': 5}
ASKING = tasks.Asking(2, 3, 4, True, 5)


def test_evaluate_by_tasks(monkeypatch, run_script):
    monkeypatch.setattr(tasks, 'loaded', lambda names, asking: (names, asking))
    monkeypatch.setattr(tasks, 'check_model', lambda name, what: None)
    monkeypatch.setattr(tasks, 'lm_eval_tasks', lambda directory: directory)
    monkeypatch.setattr(tasks, 'subject_of', lambda *given: given)
    asked = []
    monkeypatch.setattr(tasks, 'run', lambda *given: asked.append(given))
    monkeypatch.setattr(tasks, 'run_lm_eval', lambda *given: asked.append(given))
    more = command(MESH | COMPUTE | {'output': 'x.json'})
    given = {'tasks': ('one', 'two'), **OF_TASKS}
    code, _, error = run_script(evaluate.main, '--from', 'a', *command(given), *more)
    assert code == 0, error
    ((ours, against, loaded, asking, output),) = asked
    for subject, name, option in ((ours, 'a', '--from'), (against(), 'b', '--against')):
        assert subject[0] == name and subject[2:] == (OTHER, option)
        assert tuple(subject[1].shape.values()) == (1, 4, 1, 2)
    assert loaded == (('one', 'two'), ASKING) and asking == ASKING and output.name == 'x.json'

    given = {'lm-eval': 'folder', **{name: OF_TASKS[name] for name in ('shots', 'limit', 'seed')}}
    code, _, error = run_script(evaluate.main, 'a', *command(given), *more)
    assert code == 0, error
    _, (ours, directory, asking, output) = asked
    assert ours[0] == 'a' and ours[2:] == (OTHER, 'RUN') and directory == 'folder'
    assert asking == tasks.Asking(shots=2, limit=4, seed=5) and output.name == 'x.json'

    for option in ('--tasks', '--lm-eval'):
        for found in (None, {}):  # of a run the results are beside it, where nothing else is said
            monkeypatch.setattr(evaluate, 'read_run', lambda workdir, found=found: found)
            assert run_script(evaluate.main, 'a', option, 'one')[0] == 0
    names = [output and str(output) for *_, output in asked[2:]]
    assert names == [None, 'a/tasks.json', None, 'a/lm-eval.json']


def test_every_task_is_asked_as_the_options_say(monkeypatch, capsys):
    asked = []

    class Outcome:
        examples = ()

        def __init__(self, *given, tell, **how):
            asked.append((*given, how))

        def result(self, *, seed):
            asked.append(('result', seed))
            return {'kind': 'text', 'items': 7, 'shots': 2, 'shot_seeds': 3, 'metrics': {}}

        def against(self, other, *, seed):
            asked.append(('difference', seed))
            return {}

    monkeypatch.setattr(tasks.ask, 'ask', Outcome)
    ours, theirs = (types.SimpleNamespace(name=name) for name in ('a', 'b'))
    one = types.SimpleNamespace(task=types.SimpleNamespace(name='sums'))
    result = tasks.run(ours, lambda: theirs, [one], ASKING, None)
    how = {'seed': 5, 'truncate': True}
    assert asked == [
        *((ours, one, how), ('result', 5)),
        *((theirs, one, how), ('result', 5), ('difference', 5)),
    ]
    assert result['seed'] == 5 and result['against']['model'] == 'b'
    assert 'sums: a, 7 items, 2 shots, 3 draws\n' in capsys.readouterr().out


def test_lm_eval_is_asked_as_the_options_say(monkeypatch, capsys, tmp_path):
    asked = {}
    harness = types.ModuleType('llama_jax.evaluate.harness')
    harness.HarnessLM = lambda subject: ('lm', subject)
    harness.evaluate = lambda *given, **how: (
        asked.update(how, given=given)
        or {
            'results': {'one': 1},
            'samples': {'one': [{'doc': '数'}]},
        }
    )
    harness.table = lambda result: 'its own table'
    monkeypatch.setitem(sys.modules, harness.__name__, harness)
    monkeypatch.delattr('llama_jax.evaluate.harness', raising=False)
    tasks.run_lm_eval('subject', 'folder', ASKING, tmp_path / 'x.json')
    assert asked.pop('given') == (('lm', 'subject'), 'folder')
    assert asked == {'shots': 2, 'limit': 4, 'seed': 5}
    assert json.loads((tmp_path / 'x.json').read_text()) == {'results': {'one': 1}}
    assert json.loads((tmp_path / 'x-one.jsonl').read_text()) == {'doc': '数'}
    assert capsys.readouterr().out == f'its own table\n{tmp_path}/x.json\n'
