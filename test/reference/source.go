package reference

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// source is what Reasons knows of the source text: enough to tell what strings
// an expression can be, without types.
type source struct {
	fset   *token.FileSet
	calls  []*call
	byName map[string][]*call             // calls by the last name of what is called
	consts map[string]map[string]ast.Expr // by directory and name, package level
}

type sourceFile struct {
	imports map[string]string // name to path
}

// call is a call expression with the functions that it stands in, outermost
// first.
type call struct {
	expr   *ast.CallExpr
	room   string // directory
	file   *sourceFile
	within []*function
	// caller, if it is set, is the one call of within's last that counts.
	caller *call
}

// function is a declaration, or a literal that was given a name.
type function struct {
	name   string
	params []string
	body   *ast.BlockStmt
}

// errUnknown is for an expression that could be anything.
var errUnknown = errors.New("its value can't be told from the source")

func readSource(root string, dirs ...string) (*source, error) {
	s := &source{fset: token.NewFileSet(), byName: map[string][]*call{}, consts: map[string]map[string]ast.Expr{}}
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(root, dir), func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || strings.HasSuffix(name, ".pb.go") {
				return err
			}
			file, err := parser.ParseFile(s.fset, name, nil, 0)
			if err != nil {
				return err
			}
			room, err := filepath.Rel(root, filepath.Dir(name))
			if err == nil {
				s.read(filepath.ToSlash(room), file)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *source) read(room string, file *ast.File) {
	f := &sourceFile{imports: map[string]string{}}
	for _, imp := range file.Imports {
		f.imports[importName(imp)], _ = strconv.Unquote(imp.Path.Value)
	}
	if s.consts[room] == nil {
		s.consts[room] = map[string]ast.Expr{}
	}
	for _, decl := range file.Decls {
		gen, ok := decl.(*ast.GenDecl)
		if !ok || gen.Tok != token.CONST {
			continue
		}
		for _, spec := range gen.Specs {
			values := spec.(*ast.ValueSpec)
			for i, name := range values.Names {
				if i < len(values.Values) {
					s.consts[room][name.Name] = values.Values[i]
				}
			}
		}
	}
	s.walk(file, nil, room, f)
}

// walk collects the calls below n.
func (s *source) walk(n ast.Node, within []*function, room string, f *sourceFile) {
	named := map[*ast.FuncLit]string{}
	ast.Inspect(n, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for i, value := range n.Rhs {
				if lit, ok := value.(*ast.FuncLit); ok && i < len(n.Lhs) {
					if name, ok := n.Lhs[i].(*ast.Ident); ok {
						named[lit] = name.Name
					}
				}
			}
		case *ast.FuncDecl:
			if n.Body != nil {
				s.walk(n.Body, append(slices.Clip(within), &function{n.Name.Name, params(n.Type), n.Body}), room, f)
			}
			return false
		case *ast.FuncLit:
			s.walk(n.Body, append(slices.Clip(within), &function{named[n], params(n.Type), n.Body}), room, f)
			return false
		case *ast.CallExpr:
			c := &call{expr: n, room: room, file: f, within: within}
			s.calls = append(s.calls, c)
			switch fun := n.Fun.(type) {
			case *ast.Ident:
				s.byName[fun.Name] = append(s.byName[fun.Name], c)
			case *ast.SelectorExpr:
				s.byName[fun.Sel.Name] = append(s.byName[fun.Sel.Name], c)
			}
		}
		return true
	})
}

func params(t *ast.FuncType) (names []string) {
	for _, field := range t.Params.List {
		for _, name := range field.Names {
			names = append(names, name.Name)
		}
		if len(field.Names) == 0 {
			names = append(names, "_")
		}
	}
	return names
}

func (s *source) position(n ast.Node) string {
	p := s.fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

// texts returns what strings the argument can be, and nothing for one that is
// taken from another fault.
func (c *call) texts(s *source, arg int) ([]string, error) { return s.expect(c, arg, s.text) }

// names is texts for a kind: fault.NotFound is NotFound.
func (c *call) names(s *source, arg int) ([]string, error) { return s.expect(c, arg, s.kind) }

func (s *source) expect(c *call, arg int, read func(*call, ast.Expr, int) ([]string, error)) ([]string, error) {
	if arg >= len(c.expr.Args) {
		return nil, fmt.Errorf("%s: too few arguments", s.position(c.expr))
	}
	got, err := read(c, c.expr.Args[arg], 0)
	if err != nil {
		return nil, fmt.Errorf("%s: argument %d: %w", s.position(c.expr), arg+1, err)
	}
	return got, nil
}

const maxDepth = 8

// text evaluates e, which stands in c.
func (s *source) text(c *call, e ast.Expr, depth int) ([]string, error) {
	if depth > maxDepth {
		return nil, errUnknown
	}
	switch e := e.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(e.Value)
		return []string{text}, err
	case *ast.ParenExpr:
		return s.text(c, e.X, depth+1)
	case *ast.Ident:
		return s.named(c, e.Name, depth, s.text)
	case *ast.SelectorExpr:
		if pkg, ok := e.X.(*ast.Ident); ok {
			if dir, ours := strings.CutPrefix(c.file.imports[pkg.Name], module); ours {
				if value := s.consts[dir][e.Sel.Name]; value != nil {
					return s.text(c, value, depth+1)
				}
			}
		}
	case *ast.CallExpr:
		if name, ok := (&call{expr: e, file: c.file}).of(s, "pkg/fault"); ok && name == "ReasonOf" {
			return nil, nil
		}
	}
	return nil, errUnknown
}

// kind evaluates e as a kind.
func (s *source) kind(c *call, e ast.Expr, depth int) ([]string, error) {
	switch e := e.(type) {
	case *ast.Ident:
		return s.named(c, e.Name, depth, s.kind)
	case *ast.SelectorExpr:
		if pkg, ok := e.X.(*ast.Ident); ok && c.file.imports[pkg.Name] == path.Join(module, "pkg/fault") {
			return []string{e.Sel.Name}, nil
		}
	}
	return nil, errUnknown
}

// named evaluates a name: a variable of the functions around c, a parameter of
// one of them, or a constant.
func (s *source) named(c *call, name string, depth int, read func(*call, ast.Expr, int) ([]string, error)) ([]string, error) {
	if depth > maxDepth {
		return nil, errUnknown
	}
	for _, f := range slices.Backward(c.within) {
		if values := assigned(f.body, name); len(values) > 0 {
			return union(values, func(e ast.Expr) ([]string, error) { return read(c, e, depth+1) })
		}
		if i := slices.Index(f.params, name); i >= 0 {
			return s.passed(c, f, i, depth, read)
		}
	}
	if value := s.consts[c.room][name]; value != nil {
		return read(c, value, depth+1)
	}
	return nil, errUnknown
}

// perCaller returns c once for each call of the function that it stands in, if
// an argument of it is a parameter there: what one caller passes belongs
// together.
func (s *source) perCaller(c *call, arg ast.Expr) []*call {
	id, ok := arg.(*ast.Ident)
	if !ok || len(c.within) == 0 {
		return []*call{c}
	}
	f := c.within[len(c.within)-1]
	if !slices.Contains(f.params, id.Name) || len(assigned(f.body, id.Name)) > 0 {
		return []*call{c}
	}
	var all []*call
	for _, caller := range s.callers(c, f) {
		one := *c
		one.caller = caller
		all = append(all, &one)
	}
	if len(all) == 0 {
		return []*call{c}
	}
	return all
}

// passed evaluates what callers of f give for its parameter i.
func (s *source) passed(c *call, f *function, i, depth int, read func(*call, ast.Expr, int) ([]string, error)) ([]string, error) {
	callers := s.callers(c, f)
	if c.caller != nil && f == c.within[len(c.within)-1] {
		callers = []*call{c.caller}
	}
	callers = slices.DeleteFunc(callers, func(other *call) bool { return i >= len(other.expr.Args) })
	if len(callers) == 0 {
		return nil, errUnknown
	}
	return union(callers, func(other *call) ([]string, error) { return read(other, other.expr.Args[i], depth+1) })
}

// callers are the calls of f, a function around c.
func (s *source) callers(c *call, f *function) (all []*call) {
	for _, other := range s.byName[f.name] {
		here := other.room == c.room
		if sel, ok := other.expr.Fun.(*ast.SelectorExpr); ok && !here {
			pkg, _ := sel.X.(*ast.Ident)
			here = pkg != nil && other.file.imports[pkg.Name] == path.Join(module, c.room)
		}
		if here {
			all = append(all, other)
		}
	}
	return all
}

// assigned are the values that a function gives to a variable of its own.
func assigned(body *ast.BlockStmt, name string) (values []ast.Expr) {
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.AssignStmt:
			for i, left := range n.Lhs {
				if id, ok := left.(*ast.Ident); ok && id.Name == name {
					values = append(values, n.Rhs[min(i, len(n.Rhs)-1)])
				}
			}
		case *ast.ValueSpec:
			for i, id := range n.Names {
				if id.Name == name && i < len(n.Values) {
					values = append(values, n.Values[i])
				}
			}
		}
		return true
	})
	return values
}

func union[T any](from []T, read func(T) ([]string, error)) ([]string, error) {
	var all []string
	for _, one := range from {
		some, err := read(one)
		if err != nil {
			return nil, err
		}
		for _, text := range some {
			if !slices.Contains(all, text) {
				all = append(all, text)
			}
		}
	}
	return all, nil
}

const anything = "…"

var verb = regexp.MustCompile(`%[-+# 0]*[0-9]*(\.[0-9]+)?[a-zA-Z]`)

// sentences returns what an argument for people says, with … for the parts that
// are known at run time only.
func (c *call) sentences(s *source, arg int) []string {
	all := s.sentence(c, c.expr.Args[arg], 0)
	for i, text := range all {
		text = strings.ReplaceAll(verb.ReplaceAllString(text, anything), "%%", "%")
		all[i] = strings.TrimSpace(text)
	}
	return all
}

func (s *source) sentence(c *call, e ast.Expr, depth int) []string {
	if depth > maxDepth {
		return []string{anything}
	}
	switch e := e.(type) {
	case *ast.BinaryExpr:
		var all []string
		for _, left := range s.sentence(c, e.X, depth+1) {
			for _, right := range s.sentence(c, e.Y, depth+1) {
				all = append(all, left+right)
			}
		}
		return all
	case *ast.CallExpr:
		if sel, ok := e.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Sprintf" {
			return s.sentence(c, e.Args[0], depth+1)
		}
	case *ast.Ident:
		read := func(c *call, e ast.Expr, depth int) ([]string, error) { return s.sentence(c, e, depth), nil }
		if all, err := s.named(c, e.Name, depth, read); err == nil && len(all) > 0 {
			return all
		}
	default:
		if all, err := s.text(c, e, depth+1); err == nil && len(all) > 0 {
			return all
		}
	}
	return []string{anything}
}
