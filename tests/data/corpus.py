"""Text for the tests."""

import argparse
import bisect
import configparser
import fnmatch
import heapq
import json
import shlex
import statistics
import string
import textwrap

MODULES = (
    argparse, bisect, configparser, fnmatch, heapq, json, shlex, statistics, string, textwrap
)  # fmt: skip

# The opening of the Romance of the Three Kingdoms (14th century).
CHINESE = (
    '滾滾長江東逝水，浪花淘盡英雄。是非成敗轉頭空：青山依舊在，幾度夕陽紅。',
    '白髮漁樵江渚上，慣看秋月春風。一壺濁酒喜相逢：古今多少事，都付笑談中。',
    '話說天下大勢，分久必合，合久必分。周末七國分爭，并入於秦。',
    '及秦滅之後，楚、漢分爭，又并入於漢。漢朝自高祖斬白蛇而起義，一統天下。',
    '後來光武中興，傳至獻帝，遂分為三國。推其致亂之由，殆始於桓、靈二帝。',
)
