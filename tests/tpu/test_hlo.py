"""Reading collectives from the text of a program."""

from pathlib import Path

import pytest

from tpu import hlo

TEXT = (Path(__file__).parent / 'program.txt').read_text(encoding='utf-8')


def found(text=TEXT):
    return {
        (c.kind, c.shapes, c.n_bytes, c.count, c.group, c.rewritten)
        for c in hlo.collectives(hlo.parse(text))
    }


def test_collectives_are_counted_through_loops_and_fusions():
    assert found() == {
        ('all-gather', ('bf16[8,16]',), 256, 3, 2, False),
        ('all-gather', ('bf16[8,16]',), 256, 1, 2, False),
        ('all-gather', ('bf16[8,16]',), 256, 1, 4, False),
        ('reduce-scatter', ('bf16[8,16]',), 256, 3, 2, True),
        ('reduce-scatter', ('bf16[8,16]',), 256, 1, 4, True),
        ('all-reduce', ('f32[]', 'bf16[8,16]'), 4 + 256, 1, 4, False),
        ('all-reduce', ('bf16[8,16]',), 256, 1, 2, False),
        ('reduce-scatter', ('4 x f32[2,16]',), 512, 1, 4, False),
    }


def test_pieces_added_up_are_a_gather():
    assert [c.op_name for c in hlo.collectives(hlo.parse(TEXT)) if c.gathers] == ['slow']
    fused = '%neg = bf16[8,16]{1,0} negate(%p0)'
    into_zeros = '%neg = bf16[8,16]{1,0} dynamic-update-slice(%p0, %p0)'
    text = TEXT.replace(
        'dynamic-update-slice(%zeros, %w, %zero, %zero)',
        'fusion(%zeros), kind=kLoop, calls=%used_whole',
    )
    assert not [c for c in hlo.collectives(hlo.parse(text)) if c.gathers]
    text = text.replace(fused, into_zeros)
    assert [c.op_name for c in hlo.collectives(hlo.parse(text)) if c.gathers] == ['slow']


def test_most_bytes_stand_first():
    totals = [c.n_bytes * c.count for c in hlo.collectives(hlo.parse(TEXT))]
    assert totals == sorted(totals, reverse=True)


def test_place_in_the_source_leaves_out_transformations():
    names = {c.op_name for c in hlo.collectives(hlo.parse(TEXT)) if c.count == 3}
    assert names == {'mlp/reshard', 'mlp/BTD,DF->BTF/dot_general'}


def test_reduction_used_whole_stays_an_all_reduce():
    text = TEXT.replace('fusion(%grad, %i), kind=kLoop, calls=%sliced', 'negate(%grad)')
    assert ('all-reduce', ('bf16[8,16]',), 256, 3, 2, False) in found(text)
    # A slice of it beside another use is no reduce-scatter either.
    text = TEXT.replace('tuple(%i, %splash_fwd.2)', 'tuple(%i, %splash_fwd.2, %grad)')
    assert ('all-reduce', ('bf16[8,16]',), 256, 3, 2, False) in found(text)


@pytest.mark.parametrize(
    ('change', 'turns'),
    [
        (('body=%turn', 'body=%turn, backend_config={"known_trip_count":{"n":"9"}}'), 9),
        (('direction=LT', 'direction=NE'), None),
        (('%zero = s32[] constant(0)\n  %in', '%zero = s32[] constant(1)\n  %in'), None),
    ],
)
def test_turns_of_a_loop(change, turns):
    program = hlo.parse(TEXT.replace(*change))
    loop = next(i for i in program.computations['main'] if i.opcode == 'while')
    assert hlo.trip_count(program, 'main', loop) == turns
    gather = next(c for c in hlo.collectives(program) if c.op_name == 'mlp/reshard')
    assert (gather.count, gather.inexact) == (turns or 1, turns is None)


def test_limit_that_enters_the_loop_from_outside():
    text = TEXT.replace('s32[] constant(3)', 's32[] get-tuple-element(%p), index=2')
    text = text.replace('tuple(%zero, %w)', 'tuple(%zero, %w, %n)')
    text = text.replace('  %in = ', '  %n = s32[] constant(11)\n  %in = ')
    program = hlo.parse(text)
    loop = next(i for i in program.computations['main'] if i.opcode == 'while')
    assert hlo.trip_count(program, 'main', loop) == 11


def test_kernels_and_cycles():
    program = hlo.parse(TEXT)
    assert hlo.kernels(program) == {'splash_fwd': 3}
    assert hlo.estimated_cycles(program) == 3 * (5 + 7)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match='no ENTRY'):
        hlo.parse('module @jit_step {}')
