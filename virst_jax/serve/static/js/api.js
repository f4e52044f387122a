// Requests to the server. Whatever goes wrong is an ApiError with a line for the reader.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const GONE = "the server does not answer; is it still running?";

async function errorOf(answer) {
  try {
    return new ApiError((await answer.json()).error, answer.status);
  } catch {
    return new ApiError(`the server answered ${answer.status}`, answer.status);
  }
}

// The answer to a request; `body` is sent as JSON, or as the form that it is.
export async function request(method, path, body) {
  const options = { method };
  if (body instanceof FormData) {
    options.body = body;
  } else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "content-type": "application/json" };
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new ApiError(GONE, 0);
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

export async function json(method, path, body) {
  const answer = await request(method, path, body);
  return answer.status === 204 ? null : answer.json();
}

// Sends a form. `told` hears what share has been sent, `signal` ends it.
export function sendForm(path, form, told, signal) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", path);
    sending.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    sending.onerror = () => reject(new ApiError("the upload broke off; try again", 0));
    sending.onabort = () => reject(new ApiError("the upload was cancelled", 0));
    sending.onload = () => {
      let answer = null;
      try {
        answer = JSON.parse(sending.responseText);
      } catch {
        // told below
      }
      if (sending.status >= 200 && sending.status < 300 && answer) resolve(answer);
      else reject(new ApiError(answer?.error ?? `the server answered ${sending.status}`, sending.status));
    };
    signal.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

// Saves an answer as a file.
export async function saveFile(path, name) {
  const answer = await request("GET", path);
  const address = URL.createObjectURL(await answer.blob());
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
