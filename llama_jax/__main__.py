"""`llama-jax pretrain ...`, which is `python -m experiments.pretrain ...` from anywhere; so is
`python -m llama_jax pretrain ...`."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys

from llama_jax import installed

COMMANDS = {
    **{
        name: f'experiments.{name}'
        for name in (
            *('pretrain', 'finetune', 'compare', 'evaluate', 'generate', 'serve', 'export'),
            *('report', 'prepare', 'scaling'),
        )
    },
    'plan': 'tpu.plan',
    'local': 'tpu.local',
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ''
    if name in COMMANDS:
        del sys.argv[1]
        sys.path.insert(0, str(installed.root()))
        _run(COMMANDS[name])
        return
    if name in ('', '-h', '--help'):
        try:
            print('\n'.join(usage()), flush=True)
        except BrokenPipeError:  # `| head`; Python flushes once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0 if name else 2)
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(COMMANDS)}'
    print(f'error: {installed.NAME} has no command {name!r}: {hint}', file=sys.stderr)
    raise SystemExit(2)


def _run(module: str) -> None:
    script = importlib.import_module(module)
    if module.startswith('experiments.'):
        importlib.import_module('experiments.cli').main(script.main)
    else:
        script.main()


def usage() -> list[str]:
    """The commands, and what the scripts say of themselves; none of them is loaded."""
    lines = [f'usage: {installed.NAME} COMMAND [options]', '']
    for name, module in COMMANDS.items():
        source = (installed.root() / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
        told = ast.get_docstring(ast.parse(source)) or ''
        sentence = ' '.join(told.split('\n\n')[0].split()).split(': `')[0].split('. ')[0]
        lines.append(f'  {name:<10}{sentence.rstrip(".")}')
    return [*lines, '', f'options of one: {installed.NAME} COMMAND --help']


if __name__ == '__main__':
    main()
