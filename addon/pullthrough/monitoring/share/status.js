for (const line of document.querySelectorAll("pre.copy")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(line.querySelector("code"));
    // The clipboard interface is there over HTTPS only.
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  });
  line.append(button);
}
const link = document.getElementById("link");
if (link) {
  const events = new EventSource("/events");
  events.onopen = () => { link.textContent = "live"; };
  events.onerror = () => { link.textContent = "not connected"; };
  for (const part of document.querySelectorAll("[data-live]")) {
    events.addEventListener(part.id, (event) => {
      // What somebody has reached by keyboard stays until they go on.
      if (part.contains(document.activeElement)) return;
      const open = Array.from(part.querySelectorAll("details"), (each) => each.open);
      part.innerHTML = event.data;
      part.querySelectorAll("details").forEach((each, number) => { each.open = open[number] ?? each.open; });
    });
  }
}
