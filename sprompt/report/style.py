"""The style sheet and the script of the page. Without the script every picture is a link to its file."""

STYLE = """
:root{--bg:#f6f6f3;--card:#fff;--ink:#1b1c1e;--soft:#5d6168;--line:#dddcd6;--link:#08705e;--fill:#0a7d68;--pit:#e9e8e3;
--true:#00806a;--false:#c24a00;--missed:#b0227f;
--r0:#0a7d68;--r1:#c2410c;--r2:#2563c9;--r3:#a21a8e;--r4:#8a6400;--r5:#4b5563}
@media (prefers-color-scheme:dark){:root{--bg:#111315;--card:#1a1d20;--ink:#e9eaec;--soft:#a0a6ae;--line:#2e3338;--link:#4fd1b5;
--fill:#2bb598;--pit:#0b0c0e;--true:#2fd3b0;--false:#ff9a5c;--missed:#ff8ad2;
--r0:#3ecfae;--r1:#ff9552;--r2:#74aaff;--r3:#f08be0;--r4:#e0b93c;--r5:#aab2bd}}
*{box-sizing:border-box}
html{scroll-padding-top:3.6rem;-webkit-text-size-adjust:100%}
@media (prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums}
.wide{max-width:1320px;margin:0 auto;padding:0 1.25rem}
header{padding:2.2rem 0 1.1rem}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.15;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
.lead{margin:.5rem 0 0;color:var(--soft);max-width:46rem}
h2{font-size:1.4rem;letter-spacing:-.01em;margin:0 0 .35rem;line-height:1.25}
h2 small{font-size:.85rem;font-weight:400;letter-spacing:0;color:var(--soft);margin-left:.6rem}
h3{font-size:.82rem;text-transform:none;margin:1.4rem 0 .5rem;color:var(--soft);font-weight:600}
a{color:var(--link)}
nav{position:sticky;top:0;z-index:5;background:color-mix(in srgb,var(--bg) 92%,transparent);backdrop-filter:blur(8px);
border-block:1px solid var(--line)}
nav .wide{display:flex;gap:.25rem 1.4rem;overflow-x:auto;white-space:nowrap;scrollbar-width:none}
nav a{color:var(--ink);text-decoration:none;padding:.6rem 0;font-size:.92rem;border-bottom:2px solid transparent}
nav a:hover,nav a.here{border-color:var(--fill)}
nav a.quiet{color:var(--soft)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-999px}.skip:focus{left:1rem;top:.5rem;z-index:9;background:var(--card);padding:.3rem .7rem}
main:focus{outline:none}
section{padding:2rem 0 .6rem}
section+section{border-top:1px solid var(--line);margin-top:2rem}
.note{color:var(--soft);max-width:52rem;margin:.2rem 0 1rem;overflow-wrap:anywhere}
.note b,.stats b{color:var(--ink)}
.problems{font-size:.88rem;color:var(--soft);margin:.4rem 0 1rem}
.problems li{overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft)}
details{margin-top:1rem}
.stats{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem;margin:.9rem 0 1.2rem;padding:0;list-style:none}
.stats li{font-size:.85rem;color:var(--soft)}
.stats b{display:block;font-size:1.45rem;line-height:1.2;font-weight:600;letter-spacing:-.01em}
.stats .chart{flex:1 1 15rem;max-width:24rem}
.sheet{--row:14rem;display:flex;flex-wrap:wrap;gap:1rem .8rem}
.sheet::after{content:"";flex:1000 1 0}
.sheet figure{margin:0;flex:calc(var(--ar)*100) 1 calc(var(--ar)*var(--row));min-width:0;
max-width:min(100%,calc(var(--ar)*var(--row)*1.8))}
.sheet.pairs,.sheet.sides{--row:12.5rem}
.sheet.sides .shots{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr))}
.sheet figure[hidden]{display:none}
.shots{display:flex;gap:3px;background:var(--pit);border-radius:6px;overflow:hidden}
.shots a{flex:1 1 0;min-width:0;display:block;cursor:zoom-in;position:relative}
.shots a:focus-visible{outline-offset:-3px}
.shots img{display:block;width:100%;height:auto}
.shots i{position:absolute;left:.4rem;top:.4rem;font:600 .68rem/1 system-ui,sans-serif;color:#fff;background:#000b;
padding:.28rem .4rem;border-radius:3px}
figcaption{font-size:.82rem;line-height:1.4;padding:.35rem .1rem 0}
.name{display:block;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;font-weight:600}
.meta{color:var(--soft)}
.chips{display:flex;flex-wrap:wrap;gap:.05rem .7rem;color:var(--soft)}
.chips span,.key span{white-space:nowrap}
.sides .chips span{white-space:normal}
.dot{display:inline-block;width:.62em;height:.62em;border-radius:50%;margin-right:.32em;background:var(--c);box-shadow:0 0 0 1px #0003}
.dot.hatched{background:repeating-linear-gradient(135deg,var(--c) 0 2px,#0000 2px 4px);border-radius:2px;
box-shadow:0 0 0 1.5px var(--c)}
.dot.dashed{background:none;border:1.5px dashed var(--c);box-shadow:none}
.t{color:var(--true)}.f{color:var(--false)}.m{color:var(--missed)}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.88rem;margin:.2rem 0 1rem;color:var(--soft)}
.tools{display:none;flex-wrap:wrap;gap:.5rem;margin:0 0 1rem}
.js .tools{display:flex}
button{font:inherit;font-size:.86rem;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:99px;
padding:.32rem .85rem;cursor:pointer}
button:hover{border-color:var(--soft)}
button[aria-pressed=true]{background:var(--fill);border-color:var(--fill);color:#fff}
@media (prefers-color-scheme:dark){button[aria-pressed=true]{color:#04120f}}
.charts{display:grid;gap:1.3rem 1.6rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));margin-top:.6rem}
.charts.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
.pair .plot{height:12rem}
.chart{margin:0;min-width:0}
.chart.large{grid-column:1/-1}
.chart figcaption{padding:0 0 .35rem;font-size:.88rem}
.chart figcaption b{font-weight:600}
.plot{position:relative;margin:0 .6rem 1.35rem 2.9rem;height:9.5rem;border-bottom:1px solid var(--soft)}
.large .plot{height:18rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .raw{stroke-width:1;opacity:.32}
.plot .mean{stroke-width:2}
.plot span{position:absolute;font-size:.72rem;line-height:1;color:var(--soft);white-space:nowrap}
.plot .y{right:100%;margin-right:.45rem;transform:translateY(50%)}
.plot .x{top:100%;margin-top:.4rem;transform:translateX(-50%)}
.plot .x.last{transform:translateX(-100%)}
.plot .cursor{top:0;bottom:0;border-left:1px solid var(--soft);pointer-events:none}
.plot .tip{pointer-events:none;z-index:2;background:var(--card);color:var(--ink);border:1px solid var(--line);border-radius:5px;
padding:.4rem .5rem;line-height:1.5;box-shadow:0 3px 12px #0003;white-space:pre}
.r0{--k:var(--r0)}.r1{--k:var(--r1)}.r2{--k:var(--r2)}.r3{--k:var(--r3)}.r4{--k:var(--r4)}.r5{--k:var(--r5)}
.plot path[class*=r]{stroke:var(--k)}.plot path.grid{stroke:var(--line)}
.plot path.band{stroke:none;fill:var(--k);opacity:.15}
.key [class*=r]::before{content:"";display:inline-block;width:1.1em;height:.2em;border-radius:2px;background:var(--k);
margin-right:.45em;vertical-align:.25em}
.bars{display:grid;grid-template-columns:fit-content(50%) 1fr max-content;gap:.3rem .7rem;align-items:center;font-size:.85rem;margin:0}
.bars>*{min-width:0}
.bars .who{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bars .bar{height:.7rem;border-radius:2px;background:var(--k,var(--c,var(--fill)))}
.bars .track{background:var(--pit);border-radius:2px}
.metrics{display:grid;gap:1.2rem 2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
.metrics h3{margin:.2rem 0 .4rem;color:var(--ink)}
.columns{display:flex;align-items:flex-end;gap:1px;height:3.1rem;border-bottom:1px solid var(--soft)}
.columns span{flex:1;background:var(--fill);min-height:1px;border-radius:1px 1px 0 0}
.ends{display:flex;justify-content:space-between;font-size:.72rem;color:var(--soft);padding-top:.15rem}
.prompts{display:grid;gap:1.8rem 2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,31rem),1fr))}
.prompt{display:grid;grid-template-columns:minmax(0,11fr) minmax(0,10fr);gap:.6rem 1rem;align-items:start;align-content:start;margin:0}
.prompt .shots{justify-content:center}
.prompt .shots a{flex:0 1 auto}
.prompt .shots img{width:auto;max-width:100%;max-height:19rem}
.prompt figcaption{padding:0 0 .5rem}
.kernels{display:grid;grid-template-columns:repeat(auto-fill,minmax(.8rem,1fr));gap:2px;margin:.8rem 0 0}
.kernels span{aspect-ratio:1;border-radius:2px;background:var(--c,transparent)}
.kernels .none{box-shadow:inset 0 0 0 1px var(--soft)}
@media (max-width:520px){.prompt{grid-template-columns:1fr}}
.maps{display:grid;gap:.6rem .5rem;grid-template-columns:repeat(auto-fill,minmax(min(22%,6.4rem),1fr))}
.maps figure{margin:0}
.maps img{display:block;width:100%;height:auto;border-radius:3px;aspect-ratio:var(--ar);background:#0a0c22}
.maps a{display:block;cursor:zoom-in}
.maps figcaption{font-size:.7rem;color:var(--soft);padding-top:.15rem;display:flex;justify-content:space-between;flex-wrap:wrap}
.ramp{height:.6rem;width:11rem;border-radius:2px;display:inline-block;vertical-align:middle;margin:0 .5rem}
.scroll{overflow-x:auto;margin:.4rem 0 1rem}
table{border-collapse:collapse;font-size:.86rem;min-width:100%}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:500;white-space:nowrap}
td{overflow-wrap:anywhere;min-width:5rem}
td.n{text-align:right}thead th.n{text-align:right}
tr.differs th,tr.differs td{color:var(--link);font-weight:600}
tr.best th,tr.best td{font-weight:700}
.confusion table{min-width:0}.confusion caption{text-align:left;white-space:nowrap;color:var(--soft);padding-bottom:.3rem}
.confusion td,.confusion tbody th{padding:.2rem .45rem;border:1px solid var(--line)}.confusion td{min-width:2.2rem}
.confusion thead th{vertical-align:bottom;padding:.2rem .45rem}
.confusion thead span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:9rem;overflow:hidden;text-overflow:ellipsis}
.confusion tbody th{position:sticky;left:0;background:var(--bg);max-width:11rem;overflow:hidden;text-overflow:ellipsis}
.confusion .n{background:color-mix(in srgb,var(--false) var(--s,0%),transparent)}
.confusion .n.hit{background:color-mix(in srgb,var(--fill) var(--s,0%),transparent)}
.study table{min-width:0}
.study th,.study td{padding:.3rem .55rem;min-width:0}
.study thead th{white-space:normal;vertical-align:bottom;max-width:9rem;min-width:3.4rem}
.study thead .long{min-width:9rem;max-width:11rem}
.study tbody th{white-space:normal;min-width:9rem;max-width:17rem;padding-left:0;position:sticky;left:0;background:var(--bg)}
.study td.n{white-space:nowrap}.study .words{min-width:12rem}
.key.names span{white-space:normal}
.note.small{font-size:.88rem}
.study .n small{display:block;font-size:.76rem;line-height:1.2;color:var(--soft);font-weight:400}
.strip{display:grid;grid-template-columns:minmax(0,19rem) 1fr max-content;gap:.15rem .9rem;align-items:center;font-size:.86rem}
.strip .line{position:relative;height:1.25rem;margin:0 .4rem;background:linear-gradient(var(--line),var(--line)) center/100% 1px no-repeat}
.strip i{position:absolute;top:50%;width:.62rem;height:.62rem;margin:-.31rem;border-radius:50%;background:var(--fill);opacity:.72}
.strip u{position:absolute;top:.1rem;bottom:.1rem;width:2px;margin-left:-1px;background:var(--ink)}
.strip .ends{grid-column:2;margin:0 .4rem}
.strip .n{text-align:right;color:var(--soft);white-space:nowrap}
@media (max-width:620px){.strip{grid-template-columns:1fr max-content}.strip .who{grid-column:1/-1;margin-top:.3rem}
.strip .ends{grid-column:1}}
.beside{display:grid;gap:1.4rem 1.6rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr))}
.beside h3{margin:0 0 .1rem;color:var(--ink)}.beside p{margin:0 0 .4rem;font-size:.82rem;color:var(--soft)}
.beside .maps{gap:.25rem;grid-template-columns:repeat(auto-fill,minmax(2.6rem,1fr))}
.missing div{display:grid;grid-template-columns:minmax(8rem,14rem) 1fr;gap:.2rem 1.5rem;padding:.55rem 0;
border-bottom:1px solid var(--line)}
.missing dt{font-weight:600}.missing dd{margin:0;color:var(--soft);min-width:0}
@media (max-width:520px){.missing div{grid-template-columns:1fr}}
code{font:.86em ui-monospace,"SF Mono",Consolas,"Liberation Mono",monospace;background:var(--pit);padding:.1em .35em;
border-radius:3px;overflow-wrap:anywhere}
footer{color:var(--soft);font-size:.85rem;padding:2rem 0 3rem;margin-top:2rem;border-top:1px solid var(--line)}
dialog{border:0;padding:0;margin:0;width:100vw;height:100vh;height:100dvh;max-width:none;max-height:none;background:#0b0c0e;color:#eee}
dialog[open]{display:flex;flex-direction:column}
dialog::backdrop{background:#000c}
.controls{display:flex;gap:.45rem;align-items:center;padding:.5rem .8rem}
.controls p{flex:1;margin:0;min-width:0;font-size:.9rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.controls button{background:#24282c;color:#eee;border-color:#3b4147;min-width:2.4rem}
.controls button[aria-pressed=true]{background:#2bb598;color:#04120f}
.stage{flex:1;min-height:0;display:flex;gap:6px;padding:0 .6rem .6rem}
.stage img{flex:1 1 0;min-width:0;min-height:0;object-fit:contain;height:100%}
@media (orientation:portrait){.stage{flex-direction:column}.stage img{width:100%;height:auto}}
@media print{nav,.tools{display:none!important}}
"""

SCRIPT = """
(function(){
'use strict';
var root=document.documentElement,all=function(s,e){return Array.prototype.slice.call((e||document).querySelectorAll(s))};
root.classList.add('js');
var box=document.querySelector('dialog'),stage=box.querySelector('.stage'),label=box.querySelector('p');
var plainButton=box.querySelector('[data-act=plain]'),figures=[],at=0,plain=false;
function show(){
  var links=all('a[data-full]',figures[at]);
  stage.textContent='';
  links.forEach(function(a){
    var img=new Image(),small=a.querySelector('img');
    img.alt=small.alt;img.src=plain&&a.dataset.plain?a.dataset.plain:a.getAttribute('href');
    if(a.dataset.pixels){img.style.imageRendering='pixelated'}
    if(!(plain&&stage.firstChild)){stage.appendChild(img)}
  });
  var can=links.some(function(a){return a.dataset.plain});
  plainButton.hidden=!can;plainButton.setAttribute('aria-pressed',String(plain&&can));
  label.textContent=(at+1)+' / '+figures.length+'  '+(figures[at].dataset.title||'');
}
function move(by){at=(at+by+figures.length)%figures.length;show()}
function close(){if(box.close){box.close()}}
if(box.showModal){
  all('figure').forEach(function(figure){
    all('a[data-full]',figure).forEach(function(a){
      a.addEventListener('click',function(e){
        if(e.ctrlKey||e.metaKey||e.shiftKey){return}
        e.preventDefault();
        figures=all('figure',figure.parentNode).filter(function(f){return !f.hidden&&f.querySelector('a[data-full]')});
        at=figures.indexOf(figure);plain=false;box.showModal();show();
      });
    });
  });
  box.addEventListener('click',function(e){
    var act=e.target.dataset?e.target.dataset.act:'';
    if(act==='back'){move(-1)}else if(act==='next'){move(1)}
    else if(act==='plain'){plain=!plain;show()}
    else if(act==='close'||e.target===stage||e.target===box){close()}
  });
  box.addEventListener('keydown',function(e){
    if(e.key==='ArrowLeft'){move(-1)}else if(e.key==='ArrowRight'){move(1)}
    else if(e.key==='m'&&!plainButton.hidden){plain=!plain;show()}
  });
  box.addEventListener('close',function(){
    stage.textContent='';
    var a=figures[at]&&figures[at].querySelector('a[data-full]');
    if(a){a.focus();a.scrollIntoView({block:'nearest'})}
  });
}
all('.tools').forEach(function(tools){
  var buttons=all('button',tools),sheet=document.getElementById(tools.dataset.sheet);
  buttons.forEach(function(button){
    button.addEventListener('click',function(){
      buttons.forEach(function(b){b.setAttribute('aria-pressed',String(b===button))});
      all('figure',sheet).forEach(function(f){
        f.hidden=button.dataset.kind!=='all'&&(' '+f.dataset.kinds+' ').indexOf(' '+button.dataset.kind+' ')<0;
      });
    });
  });
});
all('.plot[data-lines]').forEach(function(plot){
  var lines=JSON.parse(plot.dataset.lines),x0=+plot.dataset.x0,x1=+plot.dataset.x1,cursor,tip;
  function off(){if(cursor){cursor.remove();tip.remove();cursor=null}}
  plot.addEventListener('pointerleave',off);
  plot.addEventListener('pointermove',function(e){
    var r=plot.getBoundingClientRect(),share=Math.min(1,Math.max(0,(e.clientX-r.left)/r.width)),x=x0+share*(x1-x0);
    if(!cursor){
      cursor=document.createElement('span');cursor.className='cursor';tip=document.createElement('span');tip.className='tip';
      plot.appendChild(cursor);plot.appendChild(tip);
    }
    var rows=[],step=null;
    lines.forEach(function(line){
      var best=null;
      line.points.forEach(function(p){if(p[1]!==null&&(best===null||Math.abs(p[0]-x)<Math.abs(best[0]-x))){best=p}});
      if(best){step=step===null?best[0]:step;rows.push(line.name+'  '+Number(best[1].toPrecision(4)))}
    });
    cursor.style.left=100*share+'%';
    tip.textContent=plot.dataset.unit+' '+step+'\\n'+rows.join('\\n');
    tip.style.top='.3rem';
    if(share<.5){tip.style.left='calc('+100*share+'% + .6rem)';tip.style.right='auto'}
    else{tip.style.right='calc('+100*(1-share)+'% + .6rem)';tip.style.left='auto'}
  });
});
if('IntersectionObserver' in window){
  var links={};
  all('nav a').forEach(function(a){links[a.getAttribute('href').slice(1)]=a});
  var watch=new IntersectionObserver(function(seen){
    seen.forEach(function(s){
      if(s.isIntersecting){for(var k in links){links[k].classList.toggle('here',k===s.target.id)}}
    });
  },{rootMargin:'-15% 0px -75% 0px'});
  all('section[id]').forEach(function(s){watch.observe(s)});
}
})();
"""
