import sys,json,pathlib,dataclasses,os; sys.path.insert(0,'/work/main')
import logging; logging.basicConfig(level=logging.WARNING)
from jaxlm.data.retrieval_rows import read_retrieval_rows
p=pathlib.Path('/tmp/lead/rev1/x.jsonl')
def t(row):
    p.write_text(json.dumps(row)+'\n')
    try: r=read_retrieval_rows(p).rows[0]; print('OK', len(r.positives), len(r.negatives), r.positive_scores)
    except Exception as e: print(type(e).__name__, e)
t({"query_id":"1","query":"a","positive_passages":[{"docid":"1","title":"t","text":"x"}],"negative_passages":[{"docid":"2","title":"","text":"y"}]})
t({"anchor":"a","positive":"b","negative_1":"c","negative_2":"d"})
t({"query":"a","pos":["b"],"neg":["c"],"negative_ctxs_":["d"],"hard_negative_ctxs":[{"text":"z"}]})
t({"question":"a","positive_ctxs":[{"text":"x"}],"negative_ctxs":[{"text":"y"}],"hard_negative_ctxs":[{"text":"z"}]})
t({"sentence1":"a","sentence2":"b"}); t({"anchor":"a","positive":"b","negativ":"c"}); t({"query":"a","pos":["a"],"neg":["b"],"pos_score":[1.0]})
t({"query":"a","pos":["same"],"neg":["same","n"]})
from jaxlm.optim.optimizer import decay_mask
from recipes.train_retriever import PRESETS
import jax
from jaxlm.retrieval.towers import open_towers, TowersConfig
tw=open_towers(TowersConfig(init=os.environ['M']))
sh=jax.eval_shape(tw.init,jax.random.key(0)); m=decay_mask(sh)
l=jax.tree.leaves(m); print('leaves decayed', sum(l),'of',len(l), 'params not decayed', sum(x.size for x,y in zip(jax.tree.leaves(sh),l) if not y))
from jaxlm.optim.schedule import make_schedule
s=make_schedule(PRESETS['tsm'].optim.schedule,1e-4,5); print([float(s(i)) for i in range(5)], [1e-4*(1-(t+1)/6) for t in range(5)])
import recipes.tsm as t2
c=t2.Config(init=os.environ['M'], entities=12, negatives=2, folder=pathlib.Path('/tmp/lead/rev1/tsmA'),data='/work/shared/data/retrieval/timeqa_human',documents=1500)
try: t2.prepare(c)
except Exception as e: print('tsm data', type(e).__name__, str(e)[:200])
