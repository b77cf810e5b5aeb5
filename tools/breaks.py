"""Mutation testing: break the code, one place at a time, and tell what no test of the area notices.

    python tools/breaks.py -n 60 --seed 12 llama_jax experiments tpu configs

Files are drawn by their lines. The tests of a file are those named after it and those that import
it, the nearest four. What survives is a test that is missing or an equal program. All happens in a
copy, of what git has staged.
"""

import argparse
import ast
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OTHER = {
    **{ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.Eq: '!=', ast.NotEq: '=='},
    **{ast.In: 'not in', ast.NotIn: 'in', ast.Is: 'is not', ast.IsNot: 'is', ast.And: 'or'},
    **{ast.Or: 'and', ast.Add: '-', ast.Sub: '+', ast.Mult: '/', ast.Div: '*', ast.FloorDiv: '*'},
}


def breaks(source: str) -> list[tuple[int, str, str, str]]:
    """(line, what was, what is, the broken source): another operator or constant, a condition the
    other way round, a call or a keyword argument left out."""
    data, starts = source.encode(), [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))

    def span(node):
        begin = starts[node.lineno - 1] + node.col_offset
        return begin, starts[node.end_lineno - 1] + node.end_col_offset

    tree, silent, found = ast.parse(source), set(), []
    for node in ast.walk(tree):  # annotations and messages: nothing that a test must notice
        parts = [getattr(node, name, None) for name in ('annotation', 'returns')]
        parts += [node] * isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert)
        silent.update(*(ast.walk(part) for part in parts if isinstance(part, ast.AST)))
    for node in (node for node in ast.walk(tree) if node not in silent):
        match node:
            case (
                ast.Compare(left, [operator], [right])
                | ast.BoolOp(operator, [left, right])
                | ast.BinOp(left, operator, right)
            ) if type(operator) in _OTHER:
                place, new = (span(left)[1], span(right)[0]), f' {_OTHER[type(operator)]} '
            case ast.Constant(bool(value)):
                place, new = span(node), str(not value)
            case ast.Constant(int(value) | float(value)):
                place, new = span(node), repr(value + 1)
            case ast.If(test) | ast.IfExp(test) | ast.While(test):
                place, new = span(test), f'(not ({ast.get_source_segment(source, test)}))'
            case ast.Expr(ast.Call()):
                place, new = span(node), 'pass'
            case ast.keyword(str()):
                place, new = span(node), ''
                place = place[0], place[1] + data[place[1] :].startswith(b',')
            case _:
                continue
        broken = (data[: place[0]] + new.encode() + data[place[1] :]).decode()
        try:
            ast.parse(broken)
        except SyntaxError:  # brackets around a part of what stands there
            continue
        was = ' '.join(data[slice(*place)].decode().split())
        found.append((node.lineno, was, new.strip() or 'nothing', broken))
    return found


def tests_of(name: str) -> list[str]:
    """Of its area and named after it first, then those that import it."""
    *packages, stem = Path(name).with_suffix('').parts
    area = ROOT.joinpath('tests', *packages[packages[:1] == ['llama_jax'] :])
    imports = rf'\b{".".join(packages)}(\.{stem}\b| import (\([^)]*|[^\n]*)\b{stem}\b)'
    found = []
    for test in (ROOT / 'tests').rglob('test_*.py'):
        here, named = test.parent == area, test.stem.startswith(f'test_{stem}')
        imported = bool(re.search(imports, text := test.read_text('utf-8')))
        if (imported or here and named) and test.parent.name != 'parity':
            found.append((here and named, imported, here, -len(text), str(test.relative_to(ROOT))))
    return [test for *_, test in sorted(found, reverse=True)][:4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('where', nargs='+', help='files or directories')
    parser.add_argument('-n', type=int, default=12, help='breaks to try')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    rng, survived = random.Random(options.seed), 0
    listed = subprocess.check_output(['git', 'ls-files', *options.where], cwd=ROOT, text=True)
    names = [name for name in listed.split() if name.endswith('.py')]
    lines = [(ROOT / name).read_text('utf-8').count('\n') for name in names]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(['git', 'checkout-index', '-a', f'--prefix={folder}/'], cwd=ROOT, check=True)
        for name in rng.choices(names, lines, k=options.n):
            path, tests = Path(folder) / name, tests_of(name)
            whole = path.read_text('utf-8')
            line, was, now, broken = rng.choice(breaks(whole) or [(0, 'nothing', 'nothing', whole)])
            path.write_text(broken, 'utf-8')
            pytest = [sys.executable, '-Bm', 'pytest', '-xqp', 'no:cacheprovider', *tests]
            try:
                ran = subprocess.run(pytest, cwd=folder, capture_output=True, timeout=300)
                said = 'noticed' if tests and ran.returncode else 'SURVIVED'
            except subprocess.TimeoutExpired:
                said = 'too long'
            path.write_text(whole, 'utf-8')
            survived += said == 'SURVIVED'
            print(f'{said:<8} {name}:{line}  {was}  ->  {now}', *tests, flush=True)
    print(f'{survived} of {options.n} survived')


if __name__ == '__main__':
    main()
