package kube

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/seed-caa81108/assay/pkg/fault"
)

// streams are the watches of an API server, one of nodes and one of pods at a
// time. None goes on where an earlier one ended.
type streams struct {
	mu   sync.Mutex
	away bool
	open map[string]*io.PipeWriter // by resource
}

func (s *streams) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	answer := func(code int, body io.ReadCloser) (*http.Response, error) {
		return &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: body, Request: r}, nil
	}
	switch {
	case s.away:
		return nil, syscall.ECONNREFUSED
	case r.URL.Query().Get("sendInitialEvents") != "true": // it was away too long
		return answer(http.StatusGone, io.NopCloser(strings.NewReader(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}`)))
	}
	out, in := io.Pipe()
	s.open[resource] = in
	return answer(http.StatusOK, out)
}

// leave breaks all watches.
func (s *streams) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = true
	for _, in := range s.open {
		_ = in.Close()
	}
	clear(s.open)
}

func (s *streams) back() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = false
}

// tell sends an event. A nil object is the end of what there was when the watch
// began.
func (s *streams) tell(t *testing.T, resource, kind string, object any) {
	t.Helper()
	event := "ADDED"
	if object == nil {
		event, object = "BOOKMARK", metav1.PartialObjectMetadata{
			ObjectMeta: metav1.ObjectMeta{ResourceVersion: "9", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}},
		}
	}
	data, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	data = []byte(strings.Replace(string(data), "{", `{"kind":"`+kind+`","apiVersion":"v1",`, 1))
	line, err := json.Marshal(map[string]any{"type": event, "object": json.RawMessage(data)})
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	in := s.open[resource]
	s.mu.Unlock()
	if in == nil {
		t.Fatalf("nobody watches %s", resource)
	}
	if _, err := in.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
}

// NEG-23: what was known before the API server went away for long is not gone by
// while it tells what there is now, which takes a while in a large cluster.
func TestWhatWasKnownIsNotGoneByWhileItIsToldAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &streams{open: map[string]*io.PipeWriter{}}
		a, err := newAPI("prod", &rest.Config{Host: "http://api", Transport: s}, "test")
		if err != nil {
			t.Fatal(err)
		}
		c := &cluster{name: "prod", api: a, index: newIndex("prod")}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.run(ctx, slog.New(slog.DiscardHandler))
		}()
		want := func(uid, reason string) {
			t.Helper()
			synctest.Wait()
			_, err := c.index.podOn("uid-a", uid, time.Now())
			if err == nil && reason != "" || err != nil && fault.ReasonOf(err) != reason {
				t.Errorf("pod %s: %v, want %q", uid, err, reason)
			}
		}
		versioned := func(p *corev1.Pod) *corev1.Pod { p.ResourceVersion = "1"; return p }
		a1 := node("a", "uid-a")
		a1.ResourceVersion = "1"

		synctest.Wait()
		s.tell(t, "nodes", "Node", a1)
		s.tell(t, "pods", "Pod", versioned(pod("1", "p-1", "a")))
		want("p-1", "pod_index_not_synced")
		s.tell(t, "nodes", "Node", nil)
		s.tell(t, "pods", "Pod", nil)
		want("p-1", "")

		s.leave()
		<-time.After(maxStale / 2)
		want("p-1", "")
		<-time.After(maxStale)
		want("p-1", "pod_index_not_synced")

		s.back()
		<-time.After(2 * time.Minute)
		synctest.Wait()
		s.tell(t, "nodes", "Node", a1)
		s.tell(t, "pods", "Pod", versioned(pod("2", "p-2", "a")))
		want("p-1", "pod_index_not_synced") // it may be gone, and is
		s.tell(t, "nodes", "Node", nil)
		s.tell(t, "pods", "Pod", nil)
		want("p-1", "no_such_workload_on_node")
		want("p-2", "")

		// The same in a moment costs nothing.
		s.leave()
		s.back()
		<-time.After(maxStale / 2)
		want("p-2", "")
		<-time.After(maxStale)
		want("p-2", "pod_index_not_synced") // though both watches are open: they have told nothing yet

		stop()
		s.leave()
		<-done
	})
}

// A server that stops does not wait for an API server that is away.
func TestStoppingDoesNotWaitForAnAPIServerThatIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, err := newAPI("prod", &rest.Config{Host: "http://api", Transport: &streams{away: true}}, "test")
		if err != nil {
			t.Fatal(err)
		}
		c := &cluster{name: "prod", api: a, index: newIndex("prod")}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.run(ctx, slog.New(slog.DiscardHandler))
		}()
		<-time.After(10 * time.Minute)
		stop()
		stopped := time.Now()
		<-done
		if took := time.Since(stopped); took > time.Second {
			t.Errorf("it took %v", took)
		}
		<-time.After(2 * time.Minute) // what sleeps wakes up and ends
	})
}
