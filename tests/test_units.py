from llama_jax.units import duration, size


def test_times_and_sizes_as_people_read_them() -> None:
    assert [duration(x) for x in (8.06, 59.96, 247, 3840, 200_000)] == [
        *('8.1 s', '60.0 s', '4 min 07 s', '1 h 04 min', '2 d 7 h'),
    ]
    assert [size(n) for n in (0, 813, 999.9, 1_340, 999_999, 93_100_000, 2.47e9, 7e12)] == [
        *('0 B', '813 B', '1 kB', '1.34 kB', '1 MB', '93.1 MB', '2.47 GB', '7 TB'),
    ]
