// Times of viz.html in a browser: told on the console as one line of JSON.
addEventListener("load", async () => {
  const opened = performance.now(), find = id => document.getElementById(id);
  const painted = () => new Promise(done => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => done();
    channel.port2.postMessage(0);
  }));
  const image = find("stage").querySelector("img"), times = { frame: [], opacity: [], handler: [] };
  await image.decode();
  await painted();
  const shown = performance.now();
  for (let n = 0; n < 60; n++) {
    for (const [name, value] of [["frame", n % 32], ["opacity", 40 + n]]) {
      await painted();
      const start = performance.now();
      find(name).value = value;
      find(name).dispatchEvent(new Event("input"));
      if (name === "opacity") times.handler.push(performance.now() - start);
      await image.decode();
      await painted();
      times[name].push(performance.now() - start);
    }
  }
  const asked = performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length;
  console.log("MEASURED " + JSON.stringify({ opened, shown, asked, times }));
});
