import asyncio,sys,os
from tests.cli.test_bench import *
from tests.cli.test_bench import Remembering, served
import streamkv.cli.bench as b
LOOPS=[]
@pytest.mark.parametrize("k",range(12))
async def test_x(capsys,k):
    engine=Remembering()
    orig=b._bench
    async def w(*a):
        LOOPS.append(asyncio.get_running_loop()); return await orig(*a)
    b._bench=w
    async with served(engine, limits=SessionLimits(streams=4)) as (_,url):
        t=asyncio.create_task(asyncio.to_thread(main,["bench","serve",url,"--requests","10","--prompt-tokens","7","--output-tokens","20","--seed","3"]))
        done,_=await asyncio.wait({t},timeout=8)
        with capsys.disabled():
            print('done',done,'requests',len(engine.requests), 'live', len(engine._live))
            if not done:
                for l in LOOPS:
                    for k in asyncio.all_tasks(l): k.print_stack(limit=4)
                for k in asyncio.all_tasks(): k.print_stack(limit=4)
                os._exit(0)
