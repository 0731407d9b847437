const link = document.getElementById("link");
const events = new EventSource("/events");
events.onopen = () => { link.textContent = "live"; };
events.onerror = () => { link.textContent = "not connected"; };
for (const part of document.querySelectorAll("section")) {
  events.addEventListener(part.id, (event) => { part.innerHTML = event.data; });
}
