import sys; sys.path.insert(0,'/work/main')
import recipes.tsm as t, hashlib, pathlib, dataclasses, os, time
M=os.environ['M']
c=t.Config(init=M, entities=12, negatives=2, folder=pathlib.Path('/tmp/lead/rev1/tsmA'))
import logging; logging.basicConfig(level=logging.WARNING)
t.prepare(c)
h=lambda: hashlib.sha256((c.own()/'base/model.safetensors').read_bytes()).hexdigest()[:12]
print('base', h(), [ (p.name, len(p.read_text().splitlines())) for p in (c.own()/'data').glob('*.jsonl')])
import logging
try: t.prepare(dataclasses.replace(c, init='/nonexistent/model')); print('other --init: accepted, base', h())
except Exception as e: print('other init', type(e), e)
try: t.prepare(dataclasses.replace(c, max_length=32)); print('max_length 32 accepted, base says', (c.own()/'base/sentence_bert_config.json').read_text())
except Exception as e: print('len', type(e), e)
try: t.prepare(dataclasses.replace(c, negatives=3)); print('negatives 3 accepted', [ (p.name, len(p.read_text().splitlines())) for p in (c.own()/'data').glob('*.jsonl')])
except Exception as e: print('neg', type(e), e)
try: t.prepare(dataclasses.replace(c, entities=14)); print('entities accepted')
except Exception as e: print('entities', type(e), e)
